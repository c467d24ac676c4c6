"""What is trained: LoRA, or all weights (further training and new models), behind one interface."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core.errors import AdapterUnusable, JobError
from finetune.modeling import lora
from finetune.modeling.lowrank import draw_keep
from finetune.process_group import parted_like, whole

# The last linear layer of an attention or a feed-forward block, in common architectures.
LAST_LAYERS = frozenset("o_proj out_proj down_proj dense dense_4h_to_h c_proj fc2 wo w2".split())


class Trained(Protocol):
    """The trainable part of a model, always in the same order."""

    model: Any
    layers: tuple[str, ...]  # for the manifest

    @property
    def parameters(self) -> list[nn.Parameter]: ...

    def tensors(self) -> dict[str, Tensor]:
        """CPU copies for a checkpoint. Collective."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned; other names are ignored. Raises KeyError or RuntimeError."""

    def untrained(self) -> AbstractContextManager[None]:
        """Context in which the model is the one training started from."""

    def version(self, folder: Path, fingerprint: str) -> AbstractContextManager[None]:
        """Context in which the model carries the adapter of that folder. Raises AdapterUnusable."""


class LoraDelta:
    """LoRA on every linear layer but the output layer."""

    def __init__(self, model: Any, *, rank: int, alpha: int, dropout: float, rslora: bool) -> None:
        """Raises JobError for an unsuitable model."""
        self.model = model
        self.layers = tuple(lora.add_lora(model, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return lora.trainable(self.model)

    def tensors(self) -> dict[str, Tensor]:
        return lora.state(self.model)

    def load(self, tensors: dict[str, Tensor]) -> None:
        lora.load_state(self.model, tensors)

    def untrained(self) -> AbstractContextManager[None]:
        return lora.without_lora(self.model)

    def version(self, folder: Path, fingerprint: str) -> AbstractContextManager[None]:
        return lora.with_adapter(self.model, folder, fingerprint)


class AllWeights:
    """All weights. Residual dropout after attention and feed-forward blocks (Vaswani et al. 2017, 5.4)."""

    def __init__(self, model: Any, *, dropout: float, original: Callable[[], Any]) -> None:
        """`original` loads the initial model again. Raises JobError."""
        self.model, self.original = model, original
        self.layers: tuple[str, ...] = ("all weights",)
        model.requires_grad_(True)
        last = [m for name, m in model.named_modules() if name.rpartition(".")[2] in LAST_LAYERS]
        if dropout and not last:
            raise JobError(detail=f"no place for dropout is known in {type(model).__name__}; set finetune.dropout=0")
        for module in last if dropout else ():
            module.register_forward_hook(_dropping(dropout))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.model.named_parameters()]

    def tensors(self) -> dict[str, Tensor]:
        return {name: whole(parameter.detach()).cpu() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(parted_like(tensors[name], parameter))

    @contextmanager
    def untrained(self) -> Iterator[None]:
        kept = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.load({name: parameter.detach() for name, parameter in self.original().named_parameters()})
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(kept[name])

    def version(self, folder: Path, fingerprint: str) -> AbstractContextManager[None]:
        raise AdapterUnusable(detail="an adapter is not put on a model whose own weights are trained")


def _dropping(dropout: float) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def drop(module: nn.Module, given: Any, out: Tensor) -> Tensor | None:
        if not module.training:
            return None
        keep, scale = draw_keep(out.shape, dropout, out)
        return out * keep.mul_(scale)

    return drop
