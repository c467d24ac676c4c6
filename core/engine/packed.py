"""Linear layers with float32 weights packed for the CPU, by oneDNN or MKL. Knows no families, rows or requests.

torch's own float32 product packs its weights anew at each call. Two libraries that come with torch keep them packed,
and which of them is quicker is the processor's matter. On two cores, over the products of a layer of SmolLM2-135M for
8, 32 and 256 rows: a Zen 5 with AVX-512 leaves MKL far behind oneDNN; an Intel with AVX-512 takes with MKL 0.6, 0.8 and
0.9 of oneDNN's time. On a Zen 4 a single row takes with oneDNN 0.6 of the time of torch's own product. The choice
follows from the processor alone and nothing is measured, so that the same question has the same answer, to the last
bit, also after a restart on a busy machine. The packed weights are a copy: the plain ones are mapped from their file,
so the system takes their pages back when memory is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

PACKED_FOR = 256  # rows, told to MKL; what it packs for fewer suits long prompts badly, and this suits both
_COMPARED = (8, 32, 1, 3, PACKED_FOR)  # rows


class PackedLinear(nn.Module):
    """y = W x + b, W of (out, in) packed. A row's result depends on that row alone."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """W is the weights one under another."""
        super().__init__()
        whole = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        self.out_features, self.in_features = whole.shape
        self.by_mkl = mkl_packs()
        self._packed = _packed(whole.contiguous(), self.by_mkl)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self._packed, self.out_features, self.bias, self.by_mkl)


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
        # go the plain way, though MKL packs the same for any. `mkl_packs` has seen that it does.
        shape = x.new_empty(1, 1).expand(outputs, x.shape[-1])
        y = torch.ops.mkl._mkl_linear(x, packed, shape, bias, x.numel() // x.shape[-1])
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


@cache
def mkl_packs() -> bool:
    """Whether this is an Intel's processor and MKL's packed product is there and right."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")):  # type: ignore[no-untyped-call]  # torch does not type it
        return False
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if "Intel" not in str(told.get("cpu_name", "")):
        return False
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 64, generator=dice)
    packed = [_packed(weight, by_mkl) for by_mkl in (False, True)]
    for rows in _COMPARED:
        x = torch.randn(rows, 64, generator=dice)
        by_onednn, by_mkl = (_product(x, packed[i], 256, None, bool(i)) for i in (0, 1))
        if not torch.allclose(by_mkl, by_onednn, rtol=0, atol=1e-5 * float(by_onednn.abs().max())):
            return False
    return True


def packable(linear: nn.Module) -> bool:
    """Whether the linear's weights are such that a packed copy of them runs here."""
    if type(linear) is not nn.Linear:
        return False
    here: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch does not type it
    return here and linear.weight.device.type == "cpu" and linear.weight.dtype is torch.float32
