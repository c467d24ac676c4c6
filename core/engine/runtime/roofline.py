"""Roofline of decoding: bytes that a pass must read, and the bandwidth of this device.

A decode pass reads every weight once, whatever the number of rows: up to some dozen rows it is bound by memory, and
bytes / bandwidth is its minimum time.
"""

import time
from functools import cache

import torch
from torch import nn

from core.engine.cpu.int8 import Int8Linear, LinearSlice

BLOCK_BYTES = 256 * 2**20  # larger than the caches of common processors
READS = 4


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights that one pass reads: shared ones once, embeddings only as an output head."""
    int8 = 0
    seen: dict[int, int] = {}
    looked_up: dict[int, int] = {}
    for child in module.modules():
        if isinstance(child, Int8Linear | LinearSlice):
            int8 += child.out_features * child.in_features
        for tensor in child.parameters(recurse=False):
            (looked_up if isinstance(child, nn.Embedding) else seen)[tensor.data_ptr()] = tensor.nbytes
    return int8 + sum(seen.values())


@cache
def bandwidth(device: torch.device, threads: int) -> float:
    """Bytes/s that this device reads: the best of several reads of one block. Cached; `threads` are torch's now."""
    block = torch.ones(BLOCK_BYTES // 4, device=device)
    best = 0.0
    for _ in range(READS):
        _wait(device)
        began = time.perf_counter()
        block.sum()
        _wait(device)
        best = max(best, block.nbytes / (time.perf_counter() - began))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
