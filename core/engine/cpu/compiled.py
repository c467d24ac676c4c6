"""The compiled kernels on tensors, called through ctypes.

A decode step on a CPU is some 2,000 torch operators, most of them shorter than their dispatch. Each kernel replaces
about five; products read weights at memory bandwidth however few the rows, and a whole pass over the layers is one call
(core.engine.runtime.compiled_layers). Without a compiler `compiled` returns None and torch operators run instead, with
the same numbers up to rounding.

torch.compile would need the whole step as one graph for the same gain, cannot use packed weights, and would recompile
for each mix of adapters.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from core.engine.cpu.build import built_library

log = logging.getLogger(__name__)

TILE = 4  # tokens that share a read of an adapter's weights; as in kernels/simd.h

_P, _N = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "float_matmul": (_P, _P, _P, _P, _N, _N, _N),
    "int8_matmul": (_P, _P, _P, _P, _P, _N, _N, _N),
    "add_lora": (_P, _N, _P, _N, _P, _P, _P, _N, _N, _N, _N, _P),
    "run_layers": (_P, _N, _P, _P, _P, _P),
}


class CompiledOperators:
    """The operators on tensors: float32, contiguous, on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        # Outputs per block of weights.
        self.float_block: int = library.float_block()
        self.int8_block: int = library.int8_block()
        self.group: int = library.group_size()  # inputs per scale
        self.absmax: int = library.absmax()  # largest int8 weight, stored with absmax + 1 added
        self.library.scratch_size.argtypes, self.library.scratch_size.restype = (_P,), _N
        self.unroll: int = library.unroll()  # int8 weights of one output that are multiplied at once

    def __deepcopy__(self, memo: dict[int, object]) -> CompiledOperators:
        """Copies share the operators of the process."""
        return self

    def float_matmul(self, x: Tensor, weights: Tensor, bias: Tensor | None, outs: int) -> Tensor:
        """x (N, in), weights (out, in) `in_blocks` of float_block, bias (out,) -> (N, out)."""
        rows, size = x.shape
        y = x.new_empty(rows, outs)
        self.library.float_matmul(_at(x), _at(weights), _at_or_none(bias), _at(y), rows, size, outs)
        return y

    def int8_matmul(self, x: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None, outs: int) -> Tensor:
        """x (N, in), weights uint8 (out, in) with absmax + 1 added, `in_blocks` of int8_block and unroll -> (N, outs).

        x is quantized with one scale per `group` of a row's inputs. Weights are padded with zeros to whole groups,
        their float32 scales to whole blocks.
        """
        rows, size = x.shape
        y = x.new_empty(rows, outs)
        self.library.int8_matmul(*(_at(x), _at(weights), _at(scales), _at_or_none(bias), _at(y), rows, size, outs))
        return y

    def add_lora(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, tiles: Tensor, outs: Sequence[int]) -> None:
        """y (N, sum of outs) += B (A x), in place, each token of x (N, in) with the slot that `tiles_of` gave it.

        a (S, P * R, in) and b (S, P * R, sum of outs) hold P parts; only each part's own block of b is read.
        """
        parts = len(outs)
        assert x.stride(1) == y.stride(1) == 1
        assert len(x) == len(y)
        self.library.add_lora(
            *(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), _at(a), _at(b), tiles.data_ptr(), len(tiles)),
            *(x.shape[1], parts, a.shape[1] // parts, (ctypes.c_int64 * parts)(*outs)),
        )


def in_blocks(weight: Tensor, block: int, some: int = 1, *, multiple: int = 1, blank: int = 0) -> Tensor:
    """(out, in) -> (out / block, in / some, block, some), in the order in which products read.

    Padded with `blank` to whole blocks of outputs and a `multiple` of inputs, itself a multiple of `some`.
    """
    outs, size = weight.shape
    shape = -(-outs // block) * block, -(-size // multiple) * multiple
    filled = torch.full(shape, blank, dtype=weight.dtype)
    filled[:outs, :size] = weight
    return filled.view(-1, block, shape[1] // some, some).transpose(1, 2).contiguous()


def tiles_of(slots: Sequence[int | None]) -> Tensor:
    """Slot of each token, None for the base model -> int64 (count, 2 + TILE): slot, number of tokens, their indices."""
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


def _at_or_none(tensor: Tensor | None) -> int | None:
    return None if tensor is None else _at(tensor)


def compiled() -> CompiledOperators | None:
    """The operators, built on first use; None, with the reason in the log, where that fails."""
    found = _outcome()
    return found if isinstance(found, CompiledOperators) else None


def unavailable_reason() -> str:
    """Why there are no operators; empty if there are."""
    found = _outcome()
    return "" if isinstance(found, CompiledOperators) else found


@cache
def _outcome() -> CompiledOperators | str:
    try:
        return CompiledOperators(ctypes.CDLL(str(built_library())))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = str(getattr(error, "stderr", None) or error)[:500]
        log.warning("engine.not_compiled", extra={"reason": reason})
        return reason
