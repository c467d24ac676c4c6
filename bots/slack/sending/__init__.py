"""Writing to Slack.

- sink.py: `SlackSink`; handles.py: the state of its messages; streams.py: the working status of threads
- api.py: Web API calls and their errors; rate_limits.py: when a method may be called

May import what bots.slack may, bots.slack.addresses and bots.slack.pages.
"""
