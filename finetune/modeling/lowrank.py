"""LoRA on a linear layer, or on several that share an input.

Siblings (q, k, v; gate, up) are computed together: one product with their stacked weights, one with their stacked A,
one dropout mask for the shared input. Each computes PEFT's `y = W x + (alpha / rank) B A dropout(x)`; PEFT draws a mask
per layer instead.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.modeling import matmul

RESOLUTION = 2**16  # dropout probabilities are multiples of 1 / RESOLUTION


class LoraLinear(nn.Module):
    """A frozen linear layer with LoRA. x (..., D_in) -> (..., D_out)."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: int, dropout: float, rslora: bool = False) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        device = base.weight.device  # always float32: updates are small
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.siblings = Siblings([self])

    def forward(self, x: Tensor) -> Tensor:
        return self.siblings.output(self, x)


class Siblings:
    """Layers of one module with the same input. The first one called computes the outputs of all."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        """Stacks the weights; the layers share that memory from now on."""
        self.layers = tuple(layers)
        self.weight: Tensor | None = None  # (sum of D_out, D_in)
        self.bias: Tensor | None = None
        self._x: Tensor | None = None
        self._waiting: dict[LoraLinear, Tensor] = {}
        bases = [layer.base for layer in self.layers]
        if len(bases) > 1 and all(type(base) is nn.Linear for base in bases):
            self.weight = torch.cat([base.weight.detach() for base in bases])
            for base, part in zip(bases, torch.split(self.weight, [base.out_features for base in bases]), strict=True):
                base.weight = nn.Parameter(part, requires_grad=False)
            if any(base.bias is not None for base in bases):
                self.bias = torch.cat(
                    [part.new_zeros(len(part)) if b.bias is None else b.bias.detach() for b, part in self._parts()]
                )

    def output(self, layer: LoraLinear, x: Tensor) -> Tensor:
        if self._x is not x or layer not in self._waiting:
            self._x, self._waiting = x, dict(zip(self.layers, self._compute(x), strict=True))
        y = self._waiting.pop(layer)
        if not self._waiting:
            self._x = None
        return y

    def _compute(self, x: Tensor) -> list[Tensor]:
        first = self.layers[0]
        keep, factor = None, 1.0
        if first.training and first.dropout > 0:
            keep, factor = draw_keep(x.shape, first.dropout, x)
        if self._is_stacked():
            assert self.weight is not None
            return _products(x, self.weight, self.bias, keep, factor, self.layers)
        return [_one(layer, x, keep, factor) for layer in self.layers]

    def _is_stacked(self) -> bool:
        """False once the model was moved or sharded."""
        return self.weight is not None and all(
            base.weight.data_ptr() == part.data_ptr() for base, part in self._parts()
        )

    def _parts(self) -> list[tuple[nn.Linear, Tensor]]:
        assert self.weight is not None
        bases = [layer.base for layer in self.layers]
        return list(zip(bases, torch.split(self.weight, [base.out_features for base in bases]), strict=True))


def _one(layer: LoraLinear, x: Tensor, keep: Tensor | None, factor: float) -> Tensor:
    if type(layer.base) is nn.Linear:
        return _products(x, layer.base.weight, layer.base.bias, keep, factor, (layer,))[0]
    # A quantised layer multiplies and differentiates by itself.
    dropped = x if keep is None else x * keep
    low = nn.functional.linear(dropped, layer.lora_A.to(x.dtype)) * (layer.scale * factor)
    y: Tensor = layer.base(x) + nn.functional.linear(low, layer.lora_B.to(x.dtype))
    return y


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor | None, factor: float, layers: Sequence[LoraLinear]
) -> list[Tensor]:
    pairs = [part for layer in layers for part in (layer.lora_A, layer.lora_B)]
    ys = _LoraProducts.apply(  # type: ignore[no-untyped-call]  # torch types no apply
        x, weight, bias, keep, [layer.scale * factor for layer in layers], *pairs
    )
    return list(ys)


class _LoraProducts(torch.autograd.Function):
    """y_i = W_i x + b_i + factor_i B_i A_i (keep x), with W and b frozen. Saves keep x and A x for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        factors: Sequence[float],
        *pairs: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])  # (N, D_in)
        keep = None if keep is None else keep.reshape(rows.shape)
        dropped = rows if keep is None else rows * keep
        ranks, widths = [len(a) for a in pairs[::2]], [len(b) for b in pairs[1::2]]
        lows = torch.split(dropped @ _stack(pairs[::2], x.dtype).T, ranks, dim=1)  # (N, R_i)
        ys = torch.split(matmul.forward(rows, weight, bias), widths, dim=1)  # (N, D_out_i)
        for y, low, b, factor in zip(ys, lows, pairs[1::2], factors, strict=True):
            low *= factor
            y.addmm_(low, b.to(x.dtype).T)
        ctx.save_for_backward(dropped, weight, keep, *lows, *pairs)
        ctx.factors, ctx.shape = factors, x.shape
        if len(ys) == 1:  # not a view: a model may add to it in place (Falcon)
            return (torch.ops.aten._unsafe_view(ys[0], [*x.shape[:-1], ys[0].shape[1]]),)
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        dropped, weight, keep, *rest = ctx.saved_tensors
        lows, pairs = rest[: len(grads)], rest[len(grads) :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # (N, D_out_i)
        of_pairs: list[Tensor] = []
        of_lows = []
        for grad, low, b, factor in zip(flat, lows, pairs[1::2], ctx.factors, strict=True):
            of_lows.append((grad @ b.to(grad.dtype)).mul_(factor))  # (N, R_i)
            of_pairs.append((grad.T @ low).to(b.dtype))
        of_low = of_lows[0] if len(of_lows) == 1 else torch.cat(of_lows, dim=1)
        of_a = torch.split(of_low.T @ dropped, [len(a) for a in pairs[::2]])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = matmul.backward(flat[0] if len(flat) == 1 else torch.cat(flat, dim=1), weight)
            a = _stack(pairs[::2], of_x.dtype)
            of_x = of_x.addmm_(of_low, a) if keep is None else of_x.addcmul_(of_low @ a, keep)
            of_x = of_x.view(ctx.shape)
        both = [part for a, b, like in zip(of_a, of_pairs, pairs[::2], strict=True) for part in (a.to(like.dtype), b)]
        return of_x, None, None, None, None, *both


def _stack(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Stacked along dimension 0."""
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])


def draw_keep(shape: torch.Size, dropout: float, like: Tensor) -> tuple[Tensor, float]:
    """(dropout mask of 0 and 1 in the type of `like`, scale), from torch's global generator.

    16 random bits per element: on a CPU `bernoulli_`, like a product with booleans, takes six times as long.
    """
    n = math.prod(shape)
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    dropped = min(RESOLUTION - 1, round(dropout * RESOLUTION))
    keep = torch.empty(shape, dtype=like.dtype, device=like.device)
    torch.ge(bits.view(torch.int16)[:n].view(shape), dropped - RESOLUTION // 2, out=keep)
    return keep, RESOLUTION / (RESOLUTION - dropped)
