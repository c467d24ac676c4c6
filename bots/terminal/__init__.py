"""The terminal as a platform.

- bot.py: `TerminalBot`, its sink, piped lines
- screen.py: the interactive screen: line editor, streamed Markdown, completion

May import core.platform, core.types, core.errors, core.i18n, core.config, core.commands and bots.shared.
"""
