"""How much memory a step's activations take, and what to do where that is too much. Knows no data."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
MOST = 0.6  # of what is free once the model is there


def checkpoints_activations(choice: str, model: Any, device: torch.device, tokens: int) -> bool:
    """Whether activations of so many tokens are computed twice instead of kept."""
    if choice != "auto":
        return choice == "on"
    free, needed = free_bytes(device), tokens * bytes_per_token(model)
    log.info("train.memory free=%s activations=%d MiB", free and free >> 20, needed >> 20)
    return free is not None and needed > MOST * free


def checkpoint_activations(model: Any) -> None:
    """Keep one vector per token and block, and compute the rest again on the way back: a third more time.

    Dropout draws the same again, so the gradient is the same. Source: Chen et al. 2016, arXiv 1604.06174.
    """
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def give_back() -> None:
    """Return to the system what glibc keeps of memory that is free; elsewhere nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def bytes_per_token(model: Any) -> int:
    """Of what autograd keeps: about ten vectors as wide as the model in a block, and four as wide as its middle."""
    text = model.config.get_text_config()
    wide = 4 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    element = next(model.parameters()).element_size()
    return int(text.num_hidden_layers * (10 * text.hidden_size + wide) * max(element, 2))


def free_bytes(device: torch.device) -> int | None:
    """What may still be taken, or None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
