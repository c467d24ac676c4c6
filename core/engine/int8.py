"""Linear layers with int8 weights for the CPU, exact per row. Knows no models' families, rows or requests.

Weights have one scale per output. torch's dynamic kernel takes one activation scale for the whole batch, so one
tenant's outlier would spoil another's numbers; here each row is scaled to [-1, 1] by its own largest value, and a
constant row of both -1 and 1 rides along, so that the kernel's scale is the same whatever the batch holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ENGINE = "fbgemm"


class Int8Linear(nn.Module):
    """y = W x + b with W as int8. `weight_q` is (out, in), quantised per output."""

    def __init__(self, weight_q: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_q.shape
        with _quantising():
            self._packed = torch.ops.quantized.linear_prepack(weight_q, None)
        self.bias = bias
        self._corners = torch.zeros(1, self.in_features)
        self._corners[0, 0], self._corners[0, -1] = -1.0, 1.0

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with _quantising():
            weight_q = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        return cls(weight_q, None if linear.bias is None else linear.bias.detach().float())

    def unpacked(self) -> Tensor:
        """The quantised weight (out, in)."""
        with _quantising():
            weight: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). A row's result depends on that row alone; a row that is not finite gives NaN."""
        flat = x.reshape(-1, self.in_features)
        largest = flat.abs().amax(dim=1, keepdim=True)  # 10 times as quick as vector_norm
        # A row of zeros divides to NaN, and one row's NaN would make the kernel's scale NaN for all: both become zeros
        # here, and what they should be again below.
        scaled = torch.cat((self._corners, flat / largest)).nan_to_num_(0.0)
        y: Tensor = torch.ops.quantized.linear_dynamic(scaled, self._packed, False)[1:].mul_(largest)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)


class Part(nn.Module):
    """Some of the outputs of a merged linear, as a module of their own. Slow: for what does not run merged."""

    def __init__(self, whole: Int8Linear, start: int, size: int) -> None:
        super().__init__()
        self._whole = (whole,)  # not a child module: the weights are the owner's
        self.start, self.out_features, self.in_features = start, size, whole.in_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._whole[0](x)
        return y[..., self.start : self.start + self.out_features]


def part_of(whole: Int8Linear, start: int, size: int) -> Part:
    return Part(whole, start, size)


def merge_int8(parts: Sequence[Int8Linear]) -> Int8Linear:
    """The linears side by side. Exact: scales are per output."""
    weights = [part.unpacked() for part in parts]
    scales = torch.cat([weight.q_per_channel_scales() for weight in weights])
    zeros = torch.zeros(len(scales), dtype=torch.long)
    values = torch.cat([weight.int_repr() for weight in weights])
    with _quantising():
        whole = torch._make_per_channel_quantized_tensor(values, scales, zeros, 0)
    biases = [part.bias for part in parts if part.bias is not None]
    return Int8Linear(whole, torch.cat(biases) if biases else None)


def quantize(module: nn.Module) -> None:
    """Replace every linear by one with int8 weights, in place; embeddings keep their weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear.of(child))


@contextmanager
def _quantising() -> Iterator[None]:
    """Around everything that makes a quantised tensor.

    The kernels are chosen by a process-wide setting that is read when weights are packed. torch calls its quantised
    tensors deprecated, and has no other int8 product for float inputs that is as quick.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantized tensor creation.*", category=UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before
