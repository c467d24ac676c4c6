"""The small operators of kernels.cpp, built by this machine's compiler for its processor. Knows no models or requests.

A step on a CPU is some 2,000 of torch's operators, most of them shorter than the call that starts them; these do the
work of some five each. They are built once, in a second or two, kept in the user's cache folder, and called through
ctypes on the tensors' own memory. Without a compiler `compiled` gives None, and its users run torch's operators
instead: the same numbers, to rounding.

torch.compile would need the whole step as one graph for the same gain: it knows nothing of packed weights, and it would
compile anew for each mix of adapters.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "clang++", "c++")
# -march=native for the wide registers; errors of mathematics are no news to anybody here and would forbid them.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DEADLINE_S = 60.0
TILE = 4  # tokens that read an adapter's weights together; as in kernels.cpp

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "add_norm": (_P, _P, _P, _F, _P, _N, _N),
    "silu_mul": (_P, _P, _N, _N),
    "scale_rows": (_P, _P, _P, _N, _N),
    "unscale_rows": (_P, _P, _P, _N, _N),
    "turn": (_P, _P, _P, _N, _N, _N, _N),
    "attend": (_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _F),
    "add_lora": (_P, _N, _P, _N, _P, _P, _P, _N, _N, _N, _N, _P),
}


class Compiled:
    """The operators on tensors: float32, contiguous, on the CPU. What is said to be changed is changed in place."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x (..., n) += delta, in place, if there is one; returns x / sqrt(mean(x^2) + eps) * weight."""
        out, size = torch.empty_like(x), x.shape[-1]
        added = None if delta is None else _at(delta)
        self._library.add_norm(_at(x), added, _at(weight), eps, _at(out), x.numel() // size, size)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """(N, 2 n), gates before ups -> (N, n), silu(gate) * up."""
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        self._library.silu_mul(_at(gate_up), _at(out), rows, size)
        return out

    def scale_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, n) -> each row in [-1, 1], and the largest value (N, 1) that it was divided by."""
        rows, size = x.shape
        out, largest = torch.empty_like(x), x.new_empty(rows, 1)
        self._library.scale_rows(_at(x), _at(out), _at(largest), rows, size)
        return out, largest

    def unscale_rows(self, y: Tensor, largest: Tensor, bias: Tensor | None) -> None:
        """y (N, n) *= largest (N, 1), and += bias (n,), in place."""
        self._library.unscale_rows(_at(y), _at(largest), None if bias is None else _at(bias), *y.shape)

    def turn(self, qkv: Tensor, cos: Tensor, sin: Tensor, turned: int) -> None:
        """Rotary positions cos, sin (N, n) for the first heads of qkv (N, heads, n), in place."""
        rows, heads, size = qkv.shape
        self._library.turn(_at(qkv), _at(cos), _at(sin), rows, turned, heads, size)

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, first: int, positions: Tensor, window: int | None, scale: float
    ) -> Tensor:
        """One token of each row: qkv (B, heads + 2 kv, n), turned, at positions int64 (B,) -> (B, heads * n).

        Writes to keys and values (slots, kv, length, n), of which row i has slot first + i, and reads them as far.
        """
        rows, all_heads, size = qkv.shape
        kv, capacity = keys.shape[1], keys.shape[2]
        heads = all_heads - 2 * kv
        out = qkv.new_empty(rows, heads * size)
        assert first + rows <= len(keys)
        assert positions.is_contiguous()
        begin = first * kv * capacity * size * keys.element_size()
        self._library.attend(
            *(_at(qkv), _at(keys) + begin, _at(values) + begin, positions.data_ptr(), _at(out)),
            *(rows, heads, kv, size, capacity, window or 0, scale),
        )
        return out

    def add_lora(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, tiles: Tensor, outs: Sequence[int]) -> None:
        """y (N, sum of outs) += B (A x), in place, each token of x (N, in) with the slot that `tiles_of` gave it.

        a (S, P * R, in) and b (S, P * R, sum of outs) hold P parts; of b only each part's own block is read.
        """
        parts = len(outs)
        assert x.stride(1) == y.stride(1) == 1
        assert len(x) == len(y)
        self._library.add_lora(
            *(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), _at(a), _at(b), tiles.data_ptr(), len(tiles)),
            *(x.shape[1], parts, a.shape[1] // parts, (ctypes.c_int64 * parts)(*outs)),
        )


def tiles_of(slots: Sequence[int | None]) -> Tensor:
    """The slot of each token, None for none -> int64 (count, 2 + TILE): a slot, how many tokens share it, and which."""
    tokens: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        if slot is not None:
            tokens.setdefault(slot, []).append(token)
    tiles = []
    for slot, own in tokens.items():
        for begin in range(0, len(own), TILE):
            some = own[begin : begin + TILE]
            tiles.append([slot, len(some), *some, *[0] * (TILE - len(some))])
    return torch.tensor(tiles, dtype=torch.long).view(-1, 2 + TILE)


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@cache
def compiled() -> Compiled | None:
    """The operators, built if they are not there yet; None, and the log says why, where that fails."""
    try:
        return Compiled(ctypes.CDLL(str(_built())))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning("engine.not_compiled", extra={"reason": str(said)[:500]})
        return None


def _built() -> Path:
    """The library for this source and processor. Raises OSError or CalledProcessError."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({', '.join(COMPILERS)}) is installed; the engine is slower without")
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=DEADLINE_S).stdout
    key = [SOURCE.read_bytes(), version, repr((FLAGS, platform.machine(), sorted(told.items()))).encode()]
    folder = user_cache_path("distributary") / "kernels"
    library = folder / f"{hashlib.sha256(b''.join(key)).hexdigest()[:32]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "kernels.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=DEADLINE_S)
            os.replace(made, library)  # whole or not at all, whoever else builds it
    return library
