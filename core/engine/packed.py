"""Linear layers with float32 weights as oneDNN keeps them, for the CPU. Knows no models' families, rows or requests.

torch's own float32 product is MKL's, which leaves the wide registers of some processors unused: on a Zen 5 with
AVX-512, oneDNN's is 1.7 times as quick for 1 row and 2.5 times for 8 to 128. On an Intel with AVX-512 it is 1.4 times
as quick for 4 to 32 rows, but a single row is MKL's by a fifth: so a single row goes the way that is measured to be
the quicker one here. The packed weights are a copy: the plain ones are mapped from their file, so the system takes
their pages back when memory is short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

_TRIES = 9
_CLEARLY = 0.9  # of the packed product's time


class PackedLinear(nn.Module):
    """y = W x + b, W of (out, in) packed. A row's result depends on that row alone."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """W is the weights one under another."""
        super().__init__()
        whole = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        self.out_features, self.in_features = whole.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous(), None)
        self._plain = tuple(weights) if one_row_is_plain() else ()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if self._plain and x.numel() == self.in_features:
            return self._one_row(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def _one_row(self, x: Tensor) -> Tensor:
        row, y, start = x.reshape(-1), x.new_empty(self.out_features), 0
        for weight in self._plain:
            torch.mv(weight, row, out=y[start : start + len(weight)])
            start += len(weight)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)


@cache
def one_row_is_plain() -> bool:
    """Whether a single row is clearly quicker by torch's own product; measured once, over 16 MiB of weights."""
    weight, row = torch.ones(4096, 1024), torch.ones(1, 1024)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    ways: tuple[Callable[[], object], ...] = (
        lambda: torch.mv(weight, row[0]),
        lambda: torch.ops.mkldnn._linear_pointwise(row, packed, None, "none", [], ""),
    )
    best = [float("inf")] * len(ways)
    for _ in range(_TRIES):
        for i, way in enumerate(ways):
            began = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - began)
    return best[0] < _CLEARLY * best[1]


def packable(linear: nn.Module) -> bool:
    """Whether the linear's weights are such that a packed copy of them runs here."""
    if type(linear) is not nn.Linear:
        return False
    here: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch does not type it
    return here and linear.weight.device.type == "cpu" and linear.weight.dtype is torch.float32
