"""Slack, by Bolt and slack_sdk.

- bot.py: `SlackBot`, one app by Socket Mode or HTTP; settings.py: its table of the configuration
- events.py: payload -> Incoming; receiver.py: commits payloads, then acknowledges them
- web.py: events and OAuth pages over HTTP; workspaces.py: installations and their tokens
- housekeeping.py: App Homes, modals, prompts, people's languages
- addresses.py: channels and threads as the core's addresses
- sending/: the sink; pages/: blocks, views, the manifest

May import core.platform, core.types, core.errors, core.i18n, core.config, core.commands, core.observability (masking
tokens in logs) and bots.shared.
"""
