"""Linear layers with float32 weights packed for the CPU, by oneDNN or MKL. Knows no families, rows or requests.

torch's own float32 product packs its weights anew at each call. Two libraries that come with torch keep them packed,
and which of them is quicker is the processor's matter, so it is measured once. On two cores, over the products of a
layer of SmolLM2-135M for 8, 32 and 256 rows: a Zen 5 with AVX-512 leaves MKL far behind oneDNN; an Intel with AVX-512
takes with MKL 0.6, 0.8 and 0.9 of oneDNN's time. A single row may be quicker unpacked than with oneDNN, which is
measured as well. The packed weights are a copy: the plain ones are mapped from their file, so the system takes their
pages back when memory is short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

PACKED_FOR = 256  # rows, told to MKL; what it packs for fewer suits long prompts badly, and this suits both
_TRIED_ROWS = (8, 32)  # a step of some rows
_TRIES = 9
_CLEARLY = 0.9  # of the other's time


class PackedLinear(nn.Module):
    """y = W x + b, W of (out, in) packed. A row's result depends on that row alone."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """W is the weights one under another."""
        super().__init__()
        whole = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        self.out_features, self.in_features = whole.shape
        self.by_mkl = mkl_is_quicker()
        self._packed = _packed(whole.contiguous(), self.by_mkl)
        self._plain = () if self.by_mkl or not one_row_is_plain() else tuple(weights)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if self._plain and x.numel() == self.in_features:
            return self._one_row(x)
        return _product(x, self._packed, self.out_features, self.bias, self.by_mkl)

    def _one_row(self, x: Tensor) -> Tensor:
        row, y, start = x.reshape(-1), x.new_empty(self.out_features), 0
        for weight in self._plain:
            torch.mv(weight, row, out=y[start : start + len(weight)])
            start += len(weight)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)


def _packed(weight: Tensor, by_mkl: bool) -> Tensor:
    packed: Tensor
    if by_mkl:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACKED_FOR)
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _product(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None, by_mkl: bool) -> Tensor:
    y: Tensor
    if by_mkl:
        # torch asks for the plain weight's shape alone, and for as many rows as were packed for: another number would
        # go the plain way, though MKL packs the same for any. `mkl_is_quicker` has seen that it does.
        shape = x.new_empty(1, 1).expand(outputs, x.shape[-1])
        y = torch.ops.mkl._mkl_linear(x, packed, shape, bias, x.numel() // x.shape[-1])
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


@cache
def mkl_is_quicker() -> bool:
    """Whether MKL's packed product is there, right, and clearly quicker than oneDNN's; measured over 16 MiB."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")):  # type: ignore[no-untyped-call]  # torch does not type it
        return False
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 1024, generator=dice)
    packed = [_packed(weight, by_mkl) for by_mkl in (False, True)]
    took = [0.0, 0.0]
    for rows in (*_TRIED_ROWS, 1, 3, PACKED_FOR):
        x = torch.randn(rows, 1024, generator=dice)
        ways = [partial(_product, x, packed[i], 4096, None, bool(i)) for i in (0, 1)]
        by_onednn, by_mkl = ways[0](), ways[1]()
        if not torch.allclose(by_mkl, by_onednn, rtol=0, atol=1e-5 * float(by_onednn.abs().max())):
            return False
        if rows in _TRIED_ROWS:
            took = [sum(pair) for pair in zip(took, _times(ways), strict=True)]
    return took[1] < _CLEARLY * took[0]


@cache
def one_row_is_plain() -> bool:
    """Whether a single row is clearly quicker by torch's own product than by oneDNN's; over 16 MiB of weights."""
    weight, row = torch.ones(4096, 1024), torch.ones(1, 1024)
    packed = _packed(weight, False)
    plain, other = _times((lambda: torch.mv(weight, row[0]), lambda: _product(row, packed, 4096, None, False)))
    return plain < _CLEARLY * other


def _times(ways: Sequence[Callable[[], object]]) -> list[float]:
    """The best of some tries of each, in turn: seconds."""
    best = [float("inf")] * len(ways)
    for _ in range(_TRIES):
        for i, way in enumerate(ways):
            began = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def packable(linear: nn.Module) -> bool:
    """Whether the linear's weights are such that a packed copy of them runs here."""
    if type(linear) is not nn.Linear:
        return False
    here: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch does not type it
    return here and linear.weight.device.type == "cpu" and linear.weight.dtype is torch.float32
