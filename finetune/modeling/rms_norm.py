"""RMSNorm (Zhang and Sennrich 2019) with an explicit backward pass: y = x / sqrt(mean(x^2) + eps) * w.

torch's graph of it takes some twenty operators; here it is nine, and only x and one number per row are saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

CLASSES = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})  # all compute the same


class RmsNorm(nn.Module):
    """Shares the weight of the module it replaces, under the same name. x (..., D) -> (..., D)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RmsNormFunction.apply(  # type: ignore[no-untyped-call]  # torch types no apply
            x, self.weight, self.variance_epsilon
        )
        return y


class _RmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        y: Tensor = (x * inverse).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * x).mul_(inverse).flatten(0, -2).sum(dim=0)
        if ctx.needs_input_grad[0]:
            scaled = grad * weight
            along = torch.linalg.vecdot(scaled, x)[..., None]
            of_x = (scaled * inverse).addcmul_(x, along.mul_(inverse.pow(3)).div_(-x.shape[-1]))
        return of_x, of_weight, None


def replace_rms_norms(module: nn.Module) -> None:
    """Replace the module's RMSNorms of known classes with float32 weights on a CPU."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ not in CLASSES:
                continue
            theirs: Any = child
            if theirs.weight.dtype is torch.float32 and theirs.weight.device.type == "cpu":
                setattr(parent, name, RmsNorm(theirs.weight, theirs.variance_epsilon))
