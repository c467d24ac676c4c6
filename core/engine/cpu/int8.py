"""Linear layers with int8 weights for the CPU, exact per row.

Weights have one scale per output. Inputs have scales per row: torch's dynamic kernel uses one scale for the whole
batch, so one tenant's outlier would change another's numbers. The machine decides which product runs:

- with a compiler the own kernel (kernels/int8_matmul.cpp). Over the products of a layer of SmolLM2-135M on two Zen 4
  cores it takes a fifth of fbgemm's time for 1 row, half for 16, and 0.84 for 256. Each 64 inputs have a scale, which
  keeps most of the precision that a row's few outliers would cost: the mean loss over 200 answers is 0.3 % above
  float32, against about 1 % with one scale per row. Without VNNI two products are added in 16 bits, and inputs and
  weights have 181 steps instead of 255, for another 0.5 %;
- without one fbgemm's static kernel, with inputs scaled to [-1, 1] per row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from core.engine.cpu.compiled import compiled, in_blocks

ENGINE = "fbgemm"
STEP, ZERO = 2 / 255, 128  # [-1, 1] as unsigned bytes


class BlockedKernel:
    """Our own product."""

    def __init__(self, weight_q: Tensor) -> None:
        operators = compiled()
        assert operators is not None
        self.operators = operators
        self.outs, self.size = weight_q.shape
        zero = operators.absmax + 1
        values = (weight_q.int_repr().short() + zero).to(torch.uint8)
        self.packed = in_blocks(values, operators.int8_block, operators.unroll, multiple=operators.group, blank=zero)
        self.scales = torch.zeros(len(self.packed) * operators.int8_block)
        self.scales[: self.outs] = weight_q.q_per_channel_scales()

    @staticmethod
    def works_here() -> bool:
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


class FbgemmKernel:
    """fbgemm's product."""

    def __init__(self, weight_q: Tensor) -> None:
        with _fbgemm():
            self._packed = torch.ops.quantized.linear_prepack(weight_q, None)

    @staticmethod
    def works_here() -> bool:
        return True

    @staticmethod
    def absmax() -> int:
        return _fbgemm_absmax()

    def unpacked(self) -> tuple[Tensor, Tensor]:
        with _fbgemm():
            weight: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0]
        return weight.int_repr(), weight.q_per_channel_scales()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        largest = x.abs().amax(dim=1, keepdim=True)  # 10 times as quick as vector_norm
        # What a row of zeros became is multiplied by zero, and what is not finite by its largest, which is not either.
        y = _multiply(x / largest, self._packed).mul_(largest)
        return y if bias is None else y.add_(bias)


Int8Kernel = BlockedKernel | FbgemmKernel
KERNELS: tuple[type[Int8Kernel], ...] = (BlockedKernel, FbgemmKernel)


class Int8Linear(nn.Module):
    """y = W x + b with W as int8. `weight_q` is (out, in), quantised per output."""

    def __init__(self, weight_q: Tensor, bias: Tensor | None, *, kernel: type[Int8Kernel] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_q.shape
        self.bias = bias
        self.kernel = (kernel or chosen_kernel())(weight_q)

    @classmethod
    def of(cls, linear: nn.Linear, *, kernel: type[Int8Kernel] | None = None) -> Int8Linear:
        kernel = kernel or chosen_kernel()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / kernel.absmax()).clamp_min(1e-12)
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with _fbgemm():
            weight_q = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        return cls(weight_q, None if linear.bias is None else linear.bias.detach().float(), kernel=kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). A row's result depends on it alone; if it is not finite, nothing of that is."""
        y = self.kernel(x.reshape(-1, self.in_features), self.bias)
        return y.view(*x.shape[:-1], self.out_features)


@cache
def chosen_kernel() -> type[Int8Kernel]:
    return next(kernel for kernel in KERNELS if kernel.works_here())


@cache
def _fbgemm_absmax() -> int:
    """Without AVX512-VNNI fbgemm adds products two by two in 16 bits, which bytes times bytes overflow. Weights of
    7 bits do not, and cost less than inputs of 7 bits would, which have outliers.
    """
    ones = torch.ones(1, 64)
    with _fbgemm():
        weight = torch.quantize_per_channel(ones, torch.tensor([1 / 127.0]), torch.tensor([0]), 0, torch.qint8)
        found = _multiply(ones, torch.ops.quantized.linear_prepack(weight, None))
    return 127 if abs(float(found) - 64) < 1 else 64


def _multiply(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    """x in [-1, 1]."""
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, STEP, ZERO, packed)
    return y


class LinearSlice(nn.Module):
    """Some of the outputs of a merged linear, as a module of their own. Slow: for what does not run merged."""

    def __init__(self, whole: Int8Linear, start: int, size: int) -> None:
        super().__init__()
        self._whole = (whole,)  # not a child module: the weights are the owner's
        self.start, self.out_features, self.in_features = start, size, whole.in_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._whole[0](x)
        return y[..., self.start : self.start + self.out_features]


def part_of(whole: Int8Linear, start: int, size: int) -> LinearSlice:
    return LinearSlice(whole, start, size)


def merge_int8(parts: Sequence[Int8Linear]) -> Int8Linear:
    """The linears side by side. Exact: scales are per output."""
    values, scales = (torch.cat(both) for both in zip(*(part.kernel.unpacked() for part in parts), strict=True))
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with _fbgemm():
        whole = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
    biases = [part.bias for part in parts if part.bias is not None]
    return Int8Linear(whole, torch.cat(biases) if biases else None, kernel=type(parts[0].kernel))


def quantize(module: nn.Module) -> None:
    """Replace every linear by one with int8 weights, in place; embeddings keep their weights."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear.of(child))


@contextmanager
def _fbgemm() -> Iterator[None]:
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
