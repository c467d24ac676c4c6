"""Zero tensors whose memory is allocated page by page as it is written.

The operating system hands out zeroed pages on first write, so a tensor over a fresh mapping is there at once, however
large, and uses only the memory that was written. `torch.zeros` writes all of it.
"""

import math
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor


def lazy_zeros_available() -> bool:
    """Whether this system overcommits memory: Linux does, unless configured otherwise."""
    if sys.platform != "linux":
        return False
    import resource  # Unix only

    counted = Path("/proc/sys/vm/overcommit_memory")  # 2: never overcommit, see proc_sys_vm(5)
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return not limited and counted.exists() and counted.read_text(encoding="ascii").strip() != "2"


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU; their memory is freed with the tensor and its last view. Raises MemoryError."""
    try:
        block = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error
    block.madvise(mmap.MADV_NOHUGEPAGE)  # the first byte of a huge page would take two MiB
    return torch.frombuffer(block, dtype=dtype, count=math.prod(shape)).view(shape)
