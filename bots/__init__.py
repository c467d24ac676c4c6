"""The bots: each speaks one platform and knows nothing of the model, the money or training."""
