"""Adds LoRA to the linear layers of a causal language model, and reads and writes it in PEFT's format.

Numbers equal PEFT's (tested). PEFT's layers are not used: one autograd node for all layers with the same input needs
fewer passes over memory.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.engine.lora.adapter_files import AdapterTarget, load_adapter
from core.errors import AdapterUnusable, JobError
from core.types import AdapterRef
from finetune.modeling.lowrank import LoraLinear, Siblings
from finetune.process_group import is_shard, parted_like, whole

PEFT_PREFIX = "base_model.model."


def target_names(model: Any) -> list[str]:
    """Sorted last names of all linear layers but the output layer, for PEFT's `target_modules`.

    Raises JobError without linear layers, or if a name also belongs to another kind of module.
    """
    head = model.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m) and m is not head}
    other = {name.rpartition(".")[2] for name, m in model.named_modules() if not is_linear(m) or m is head} & linear
    if not linear or other:
        reason = f"names with two meanings: {sorted(other)}" if other else "no linear layers"
        kind = type(model).__name__
        raise JobError("training.why_untrainable", f"LoRA cannot be put on {kind}: it has {reason}", model=kind)
    return sorted(linear)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear or bitsandbytes' Linear4bit (QLoRA)."""
    return type(module) is nn.Linear or type(module).__name__ == "Linear4bit"


def add_lora(model: Any, *, rank: int, alpha: int, dropout: float, rslora: bool = False) -> list[str]:
    """Freeze the model and add LoRA, drawn from torch's generator, to its linear layers. Returns `target_names`."""
    names = target_names(model)
    model.requires_grad_(False)
    places = [name for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    families = _siblings(model, places)
    for place in places:
        parent_name, _, name = place.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = getattr(parent, name)
        assert isinstance(base, nn.Linear)
        setattr(parent, name, LoraLinear(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora))
    for family in families:
        siblings = Siblings([_layer(model, place) for place in family])
        for layer in siblings.layers:
            layer.siblings = siblings
    return names


@torch.no_grad()
def _siblings(model: Any, places: Sequence[str]) -> list[list[str]]:
    """Groups of layers with the same input tensor, found by hooks in a forward pass of four tokens."""
    read: dict[tuple[str, int], list[str]] = {}
    inputs: list[Tensor] = []  # kept alive, so that no id is reused

    def record(place: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            inputs.append(given[0])
            read.setdefault((place.rpartition(".")[0], id(given[0])), []).append(place)

        return hook

    hooks = [model.get_submodule(place).register_forward_pre_hook(record(place)) for place in places]
    was_training = model.training
    try:
        ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
        model.eval()(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [family for family in read.values() if len(family) > 1 and len(set(family)) == len(family)]


def _layer(model: Any, place: str) -> LoraLinear:
    layer = model.get_submodule(place)
    assert isinstance(layer, LoraLinear)
    return layer


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """LoRA parameters in a fixed order."""
    return [parameter for _, layer in lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]


def state(model: nn.Module) -> dict[str, Tensor]:
    """A CPU copy of the LoRA weights under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{name}.lora_{letter}.weight": whole(getattr(layer, f"lora_{letter}").detach()).cpu().clone()
        for name, layer in lora_layers(model)
        for letter in "AB"
    }


@torch.no_grad()
def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load tensors of `state`. Raises KeyError or RuntimeError for another model's."""
    for name, layer in lora_layers(model):
        for letter in "AB":
            parameter = getattr(layer, f"lora_{letter}")
            parameter.copy_(parted_like(tensors[f"{PEFT_PREFIX}{name}.lora_{letter}.weight"], parameter))


class without_lora:
    """Context in which the model is the bare base model."""

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
    """Context in which the model carries the adapter of a folder, of any rank. Raises AdapterUnusable.

    The serving engine's reader loads it, so the evaluated weights are the served ones.
    """

    def __init__(self, model: nn.Module, folder: Path, fingerprint: str) -> None:
        self.layers = dict(lora_layers(model))
        if any(is_shard(layer.lora_A) for layer in self.layers.values()):
            raise AdapterUnusable(detail="a model that is sharded over processes cannot answer from another adapter")
        shapes = {name: (layer.base.out_features, layer.base.in_features) for name, layer in self.layers.items()}
        self.pairs = load_adapter(AdapterRef("", folder, folder.name), AdapterTarget(fingerprint, shapes)).pairs

    def __enter__(self) -> None:
        self.own = {name: (layer.lora_A, layer.lora_B, layer.scale) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            if name not in self.pairs:
                layer.scale = 0.0
                continue
            device, (a, b) = layer.base.weight.device, self.pairs[name]  # B includes the scale
            layer.lora_A, layer.lora_B = (nn.Parameter(part.to(device), requires_grad=False) for part in (a, b))
            layer.scale = 1.0

    def __exit__(self, *exc: object) -> None:
        for name, layer in self.layers.items():
            layer.lora_A, layer.lora_B, layer.scale = self.own[name]
