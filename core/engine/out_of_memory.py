"""Recognizes errors that another layout, or waiting, would avoid."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a lack of memory on the CPU or a GPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
