"""The home's one SQLite file, through sqlite-utils. Knows nothing of bots, engines or prompts."""
