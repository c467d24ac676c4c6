"""The Slack bot, against a strict fake of Slack."""
