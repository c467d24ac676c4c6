"""Bounds the number of kernels that oneDNN caches. Must run before torch is imported.

oneDNN caches a kernel per shape, up to 1,024, each with half a MiB of buffers. Prompts and training steps come in every
length, so a process would grow by hundreds of MiB. One step needs only a few, and creating one takes 2 ms.
"""

import os

KEPT = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "16",  # of the layer between torch and oneDNN
}


def keep_few_kernels() -> None:
    """Set the bounds that the environment does not set."""
    for name, count in KEPT.items():
        os.environ.setdefault(name, count)
