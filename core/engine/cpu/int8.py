"""Linear layers with int8 weights for the CPU, exact per row.

Weights have one scale per output. Inputs have scales per row: torch's dynamic kernel uses one scale for the whole
batch, so one tenant's outlier would change another's numbers. The machine decides which product runs:

- with a compiler the own kernel (kernels/int8_matmul.cpp). Over the products of a layer of SmolLM2-135M on two Zen 4
  cores it takes a fifth of fbgemm's time for 1 row, half for 16, and 0.84 for 256. Each 64 inputs have a scale, which
  keeps most of the precision that a row's few outliers would cost: the mean loss over 200 answers is 0.3 % above
  float32, against about 1 % with one scale per row. Without VNNI two products are added in 16 bits, and inputs and
  weights have 181 steps instead of 255, for another 0.5 %;
- without one oneDNN's (torch._int_mm), with one scale per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from core.engine.cpu.compiled import compiled, in_blocks


class BlockedKernel:
    """The own kernel. weight int8 (out, in), scales (out,)."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        operators = compiled()
        assert operators is not None
        self.operators = operators
        self.outs, self.size = weight.shape
        zero = operators.absmax + 1
        values = (weight.short() + zero).to(torch.uint8)
        self.packed = in_blocks(values, operators.int8_block, operators.unroll, multiple=operators.group, blank=zero)
        self.scales = torch.zeros(len(self.packed) * operators.int8_block)
        self.scales[: self.outs] = scales

    @staticmethod
    def available() -> bool:
        return compiled() is not None

    @staticmethod
    def absmax() -> int:
        operators = compiled()
        assert operators is not None
        return operators.absmax

    def unpacked(self) -> tuple[Tensor, Tensor]:
        values = self.packed.transpose(1, 2).flatten(0, 1).flatten(1).short() - (self.operators.absmax + 1)
        return values.to(torch.int8)[: self.outs, : self.size].contiguous(), self.scales[: self.outs]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.operators.int8_matmul(x.contiguous(), self.packed, self.scales, bias, self.outs)


class OnednnKernel:
    """oneDNN's product of int8 matrices. weight int8 (out, in), scales (out,)."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        self.weight, self.scales = weight.t().contiguous(), scales / 127

    @staticmethod
    def available() -> bool:
        return True

    @staticmethod
    def absmax() -> int:
        return _onednn_absmax()

    def unpacked(self) -> tuple[Tensor, Tensor]:
        return self.weight.t().contiguous(), self.scales * 127

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        largest = x.abs().amax(dim=1, keepdim=True)
        # A row of zeros is multiplied by zero, a non-finite one by its non-finite maximum.
        y = torch._int_mm((x / largest * 127).round().to(torch.int8), self.weight).float()
        y = y.mul_(self.scales).mul_(largest)
        return y if bias is None else y.add_(bias)


Int8Kernel = BlockedKernel | OnednnKernel
KERNELS: tuple[type[Int8Kernel], ...] = (BlockedKernel, OnednnKernel)


class Int8Linear(nn.Module):
    """y = W x + b, W int8 (out, in) with one scale per output."""

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor | None, *, kernel: type[Int8Kernel] | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.kernel = (kernel or chosen_kernel())(weight, scales)

    @classmethod
    def of(cls, linear: nn.Linear, *, kernel: type[Int8Kernel] | None = None) -> Int8Linear:
        kernel = kernel or chosen_kernel()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / kernel.absmax()).clamp_min(1e-12)
        quantized = (weight / scales[:, None]).round().to(torch.int8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        return cls(quantized, scales, bias, kernel=kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). A row's result depends on that row alone; a non-finite row has no finite output."""
        y = self.kernel(x.reshape(-1, self.in_features), self.bias)
        return y.view(*x.shape[:-1], self.out_features)


@cache
def chosen_kernel() -> type[Int8Kernel]:
    return next(kernel for kernel in KERNELS if kernel.available())


@cache
def _onednn_absmax() -> int:
    """Largest weight that oneDNN multiplies exactly.

    Without VNNI it adds two products in 16 bits, which 8-bit weights overflow and 7-bit weights do not. 7-bit inputs
    would avoid it too, but cost more: inputs have outliers.
    """
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return 127 if int(torch._int_mm(largest, largest)[0, 0]) == 64 * 127**2 else 64


class LinearSlice(nn.Module):
    """Outputs [start, start + size) of a merged linear. It computes all of them: only for unmerged use."""

    def __init__(self, whole: Int8Linear, start: int, size: int) -> None:
        super().__init__()
        self._whole = (whole,)  # in a tuple, so that it is not registered as a child module
        self.start, self.out_features, self.in_features = start, size, whole.in_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._whole[0](x)
        return y[..., self.start : self.start + self.out_features]


def merge_int8(parts: Sequence[Int8Linear]) -> Int8Linear:
    """The linears side by side. Exact, as scales are per output."""
    weight, scales = (torch.cat(both) for both in zip(*(part.kernel.unpacked() for part in parts), strict=True))
    biases = [part.bias for part in parts if part.bias is not None]
    return Int8Linear(weight, scales, torch.cat(biases) if biases else None, kernel=type(parts[0].kernel))


def quantize(module: nn.Module) -> None:
    """Replace every nn.Linear by an Int8Linear, in place. Embeddings keep their weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear.of(child))
