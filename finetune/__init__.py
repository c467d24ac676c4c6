"""What the owner of a channel can do to its adapter: one process per job. Knows neither the bots nor the store."""
