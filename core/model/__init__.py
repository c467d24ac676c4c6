"""The base model on disk and in memory.

base.py           load_model, read_model: the settings of [model] to a loaded model, or to its tokenizer alone
folder.py         the model's folder: local, demo or Hugging Face hub; checks without loading weights
devices.py        device, dtype and quantization, each with its reason in the log
weights.py        safetensors headers and the fingerprint of a base model
plain_linear.py   linear layers of other classes to nn.Linear
chat_format.py    messages to token ids by the chat template, for replies and for training
demo.py           converts the demo model from GGUF
onednn.py         bounds oneDNN's kernel cache

Imports core.config, core.types and core.errors, no engine.
"""
