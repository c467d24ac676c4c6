"""Slack's blocks and views. No file makes a call.

- blocks.py: blocks of a message; text.py: Markdown to Slack, Slack's markup to plain text
- home.py: the App Home; modals.py: modals and their submissions
- manifest.py: the app manifest

May import core.types, core.platform, core.i18n, core.config, core.commands and bots.shared.
"""
