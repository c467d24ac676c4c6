"""The Telegram bot through the real aiogram, against the fake Bot API."""
