"""Writing to Telegram.

- sink.py: `TelegramSink`; drafts.py: drafts and edits while a reply is generated
- text.py, markdown.py: Markdown -> text with entities; buttons.py: inline keyboards
- api.py: Bot API calls and their errors; rate_limits.py: when a chat may be written to

May import what bots.telegram may, and bots.telegram.addresses.
"""
