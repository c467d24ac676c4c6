"""The model, the conversation and the money. Knows nothing of Telegram, Slack or how training is done."""
