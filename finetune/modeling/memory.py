"""Memory of activations, and activation checkpointing where it is short."""

import ctypes
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
MOST = 0.6  # of the memory free after loading the model


def checkpoints_activations(choice: str, model: Any, device: torch.device, tokens: int) -> bool:
    """Whether to checkpoint the activations of a micro-batch of so many tokens."""
    if choice != "auto":
        return choice == "on"
    free, needed = free_bytes(device), tokens * bytes_per_token(model)
    log.info("train.memory free=%s activations=%d MiB", free and free >> 20, needed >> 20)
    return free is not None and needed > MOST * free


def checkpoint_activations(model: Any) -> None:
    """Keep one vector per token and block and recompute the rest in backward (Chen et al. 2016, arXiv 1604.06174).

    A step takes a third longer; the random state is restored, so the gradient is the same.
    """
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers from 5.2x on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def trim_heap() -> None:
    """Return glibc's free memory to the system; no-op elsewhere."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def bytes_per_token(model: Any) -> int:
    """Estimate of what autograd keeps: per block ten vectors of hidden size and four of intermediate size."""
    text = model.config.get_text_config()
    wide = 4 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    element = next(model.parameters()).element_size()
    return int(text.num_hidden_layers * (10 * text.hidden_size + wide) * max(element, 2))


def free_bytes(device: torch.device) -> int | None:
    """Available memory, or None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
