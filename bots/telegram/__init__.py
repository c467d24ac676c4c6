"""Telegram, by aiogram.

- bot.py: `TelegramBot`, one account by long polling or webhook; settings.py: its table of the configuration
- updates.py: Update -> Incoming; receiver.py: commits updates, then confirms them; webhook.py: the HTTP server
- housekeeping.py: callback answers and command menus
- addresses.py: chats and topics as the core's addresses
- sending/: the sink

May import core.platform, core.types, core.errors, core.i18n, core.config, core.commands and bots.shared.
"""
