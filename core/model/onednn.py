"""How many kernels oneDNN keeps. Knows no model; torch reads it when it is loaded, so it is said before.

For each shape that it was given it keeps a kernel, up to 1,024 of them, each with half a MiB of buffers and holes
between them. Prompts and training steps come in every length, so that a process grows by hundreds of MiB over its life.
What one step uses fits into a few, and one more made anew takes 2 ms.
"""

from __future__ import annotations

import os

KEPT = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "16",  # of the layer between torch and oneDNN
}


def keep_few_kernels() -> None:
    """Where the environment does not say otherwise."""
    for name, count in KEPT.items():
        os.environ.setdefault(name, count)
