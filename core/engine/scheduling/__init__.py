"""Requests between submit and their last event.

requests.py        OpenRequests: opens and closes the event stream of each request (event loop)
request_state.py   RequestState: one request of the local engine
admission.py       WaitingQueue: waiting, preparing, ready; chooses who gets a row and who is preempted
scheduler.py       Scheduler: virtual token counters by partner, channel and user
detokenizer.py     token ids to text, stop strings
stats.py           counters and histograms

Imports core.engine.protocol and core.engine.lora (the type of loaded adapters).
"""
