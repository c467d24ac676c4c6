"""The base model in training: loading, trainable parameters, forward and loss.

base (loading), fresh (a new model), methods (LoRA or all weights, as one interface), lora and lowrank (LoRA layers),
loss (chunked cross-entropy), packed_attention, rms_norm, matmul (MKL or oneDNN), memory (activation checkpointing).
Entry points: `base.load_module`, `methods.Trained`, `loss.Scorer`. Imports finetune.data and top-level files.
"""
