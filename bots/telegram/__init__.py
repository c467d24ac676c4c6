"""The Telegram bot: the one folder that imports aiogram."""
