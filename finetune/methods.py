"""What of a model is trained, and how the rest of the loop sees it. Knows no data, no optimiser and no files."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from finetune import lora


class Trained(Protocol):
    """The trainable part of a model, always in the same order."""

    parameters: list[nn.Parameter]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, on the CPU; not a copy where it is there already."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave; other names in it are no matter. Raises KeyError or RuntimeError."""

    def untrained(self) -> AbstractContextManager[None]:
        """Within this block the model is what training began from."""


class LoraDelta:
    """A low-rank delta on every linear layer but the output layer; the model itself stays as it is."""

    def __init__(self, model: Any, *, rank: int, alpha: int, dropout: float, rslora: bool) -> None:
        """Drawn from torch's generator. Raises JobError where it does not fit the model."""
        self.model = model
        self.targets = lora.add_lora(model, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
        self.parameters = lora.trainable(model)

    def tensors(self) -> dict[str, Tensor]:
        return lora.state(self.model)

    def load(self, tensors: dict[str, Tensor]) -> None:
        lora.load_state(self.model, tensors)

    def untrained(self) -> AbstractContextManager[None]:
        return lora.without_lora(self.model)

    def version(self, folder: Path, fingerprint: str) -> AbstractContextManager[None]:
        """Within this block the model answers from that adapter of this very base. Raises AdapterUnusable."""
        return lora.with_adapter(self.model, folder, fingerprint)
