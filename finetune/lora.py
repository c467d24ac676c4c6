"""LoRA on the linear layers of a causal language model, made for training on two cores. Knows nothing of data or files.

The arithmetic is PEFT's (`y = W x + (alpha / rank) B A dropout(x)`), and what `state` returns is what PEFT loads; tests
hold both to that. PEFT's own layers are not used to train: one autograd node per layer needs fewer passes over memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.engine.adapter_files import Base, load_adapter
from core.errors import AdapterUnusable, JobError
from core.types import AdapterRef
from finetune.team import is_shard, parted_like, whole

PEFT_PREFIX = "base_model.model."
RESOLUTION = 2**16  # dropout's probability is a multiple of one part in this


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable delta of low rank. x (..., D_in) -> (..., D_out)."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: int, dropout: float, rslora: bool = False) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        device = base.weight.device  # float32 whatever the base model is held in: its updates are small
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        keep, keep_scale = None, 1.0
        if self.training and self.dropout > 0:
            keep, keep_scale = draw_keep(x.shape, self.dropout, x.device)
        if type(self.base) is not nn.Linear:  # its weight is no matrix: it multiplies and differentiates by itself
            dropped = x if keep is None else x * keep
            low = nn.functional.linear(dropped, self.lora_A.to(x.dtype)) * (self.scale * keep_scale)
            return self.base(x) + nn.functional.linear(low, self.lora_B.to(x.dtype))  # type: ignore[no-any-return]
        y: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]  # torch types no apply
            x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale, keep, keep_scale
        )
        return y


class _LoraProduct(torch.autograd.Function):
    """y = W x + b + scale B A (keep_scale keep x), with W and b frozen; only x, keep and A x are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        keep: Tensor | None,
        keep_scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, D_in)
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        keep = None if keep is None else keep.reshape(rows.shape)
        low = (rows if keep is None else rows * keep) @ a.T  # (N, R)
        low *= scale * keep_scale
        y = nn.functional.linear(rows, weight, bias)
        y.addmm_(low, b.T)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low, keep)
        ctx.factor = scale * keep_scale
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, low, keep = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, grads[0].shape[-1])  # (N, D_out)
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        grad_b = grad.T @ low  # (D_out, R)
        grad_low = grad @ b  # (N, R)
        grad_low *= ctx.factor
        grad_a = grad_low.T @ (rows if keep is None else rows * keep)  # (R, D_in)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if keep is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.addcmul_(grad_low @ a, keep)
            grad_x = grad_x.reshape(x.shape)
        return grad_x, None, None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None, None, None


def draw_keep(shape: torch.Size, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """(mask of what dropout keeps, the factor that keeps the mean), from torch's global generator.

    16 random bits per element: on a CPU `bernoulli_` costs six times as much, a sixth of a whole training step.
    """
    n = math.prod(shape)
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    dropped = min(RESOLUTION - 1, round(dropout * RESOLUTION))
    keep = bits.view(torch.int16)[:n].reshape(shape) >= dropped - RESOLUTION // 2
    return keep, RESOLUTION / (RESOLUTION - dropped)


def target_names(model: Any) -> list[str]:
    """The last names of all linear layers but the output layer, sorted: what `target_modules` will say.

    Raises JobError for a model without linear layers, or one that uses a name both for a linear layer and otherwise.
    """
    head = model.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m) and m is not head}
    other = {name.rpartition(".")[2] for name, m in model.named_modules() if not is_linear(m) or m is head} & linear
    if not linear or other:
        reason = f"names with two meanings: {sorted(other)}" if other else "no linear layers"
        raise JobError(detail=f"LoRA cannot be put on {type(model).__name__}: it has {reason}")
    return sorted(linear)


def is_linear(module: nn.Module) -> bool:
    """Also one of 4 bits per weight, whose class is bitsandbytes' own (QLoRA: Dettmers 2023, arXiv 2305.14314)."""
    return type(module) is nn.Linear or type(module).__name__ == "Linear4bit"


def add_lora(model: nn.Module, *, rank: int, alpha: int, dropout: float, rslora: bool = False) -> list[str]:
    """Freeze the model and put LoRA on its linear layers, drawn from torch's generator. Returns `target_names`."""
    names = target_names(model)
    model.requires_grad_(False)
    places = [name for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    for place in places:
        parent_name, _, name = place.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = getattr(parent, name)
        assert isinstance(base, nn.Linear)
        setattr(parent, name, LoraLinear(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora))
    return names


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The delta's parameters, always in the same order."""
    return [parameter for _, layer in lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the delta under the names of PEFT's adapter_model.safetensors, on the CPU."""
    return {
        f"{PEFT_PREFIX}{name}.lora_{letter}.weight": whole(getattr(layer, f"lora_{letter}").detach()).cpu().clone()
        for name, layer in lora_layers(model)
        for letter in "AB"
    }


@torch.no_grad()
def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `state` gave. Raises KeyError or RuntimeError if it is another model's."""
    for name, layer in lora_layers(model):
        for letter in "AB":
            parameter = getattr(layer, f"lora_{letter}")
            parameter.copy_(parted_like(tensors[f"{PEFT_PREFIX}{name}.lora_{letter}.weight"], parameter))


class without_lora:
    """Within this block the model is the bare base model."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [layer for _, layer in lora_layers(model)]

    def __enter__(self) -> None:
        self.scales = [layer.scale for layer in self.layers]
        for layer in self.layers:
            layer.scale = 0.0

    def __exit__(self, *exc: object) -> None:
        for layer, scale in zip(self.layers, self.scales, strict=True):
            layer.scale = scale


class with_adapter:
    """Within this block the model answers from the adapter of a folder, of any rank. Raises AdapterUnusable.

    The folder is read by what reads it for serving: what is examined is what will answer, and nothing else passes.
    """

    def __init__(self, model: nn.Module, folder: Path, fingerprint: str) -> None:
        self.layers = dict(lora_layers(model))
        if any(is_shard(layer.lora_A) for layer in self.layers.values()):
            raise AdapterUnusable(detail="a model that is sharded over processes cannot answer from another adapter")
        shapes = {name: (layer.base.out_features, layer.base.in_features) for name, layer in self.layers.items()}
        self.pairs = load_adapter(AdapterRef("", folder, folder.name), Base(fingerprint, shapes)).pairs

    def __enter__(self) -> None:
        self.own = {name: (layer.lora_A, layer.lora_B, layer.scale) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            if name not in self.pairs:
                layer.scale = 0.0
                continue
            device, (a, b) = layer.base.weight.device, self.pairs[name]  # the scale is in B
            layer.lora_A, layer.lora_B = (nn.Parameter(part.to(device), requires_grad=False) for part in (a, b))
            layer.scale = 1.0

    def __exit__(self, *exc: object) -> None:
        for name, layer in self.layers.items():
            layer.lora_A, layer.lora_B, layer.scale = self.own[name]
