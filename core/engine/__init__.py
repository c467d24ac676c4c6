"""Generation: one base model, many adapters, one batch. Knows nothing of chats, users or SQLite."""
