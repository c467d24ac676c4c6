"""Writes replies and job messages to platforms, exactly once each.

deliveries.py   handles, parts and receipts; the sink of each account
retry.py        the retry policy: one bound for a delivery, storage waited out
live_view.py    shows a growing text, coalesced

Imports platform (the sink's contract) and storage.
"""
