"""Forward passes over rows: prefill a chunk of one, decode one token of many. Knows no requests, fairness or text.

Exactness is proved at load: what comes out of slots, chunks and mixed rows is compared with the model's own plain
forward pass, so a model whose attention works otherwise is refused, whatever its configuration says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.engine.fused import fuse
from core.engine.int8 import Int8Linear
from core.engine.kv import SlotCache
from core.engine.lora import LoraStacks
from core.errors import AppError, EngineError, ModelLoadFailed, OutOfMemory
from core.model import BaseModel

CHECK_TOKENS = 24


class Runner:
    """The model with its slots and adapter stacks. All methods belong to one thread."""

    def __init__(self, model: BaseModel, *, max_rows: int, context: int) -> None:
        module: Any = model.module
        self.module = module
        self.device = model.device
        layers: int = module.config.get_text_config().num_hidden_layers
        self.cache = SlotCache(layers, max_rows=max_rows, max_length=context)
        self.fused = fuse(model.module)
        self.lora = LoraStacks(
            model.module,
            max_slots=max_rows,
            device=model.device,
            dtype=model.dtype,
            groups=self.fused.groups if self.fused else (),
        )

    def prefill(self, row: int, ids: Sequence[int], slot: int | None) -> Tensor:
        """Take in the next ids of a row; logits (1, V) after the last of them."""
        start = self.cache.used[row]
        self.cache.reserve(start + len(ids))
        positions = torch.arange(start, start + len(ids), device=self.device)[None]  # (1, T)
        return self._forward(row, torch.tensor([list(ids)], device=self.device), positions, [slot])

    def decode(self, first: int, ids: Sequence[int], slots: Sequence[int | None]) -> Tensor:
        """Take in one id for each of the rows [first, first + B); logits (B, V)."""
        used = self.cache.used[first : first + len(ids)]
        self.cache.reserve(max(used) + 1)
        positions = torch.tensor(used, device=self.device)[:, None]  # (B, 1)
        return self._forward(first, torch.tensor(list(ids), device=self.device)[:, None], positions, slots)

    def _forward(self, first: int, ids: Tensor, positions: Tensor, slots: Sequence[int | None]) -> Tensor:
        """ids, positions (B, T) -> logits (B, V) of the last token of each row."""
        mask = self.cache.begin(first, positions)
        with self.lora.rows(slots) as plan:
            if self.fused is not None:
                logits = self.fused(ids, positions, mask, self.cache, None if plan is None else self.lora.add)
            else:
                logits = self.module(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
        self.cache.advance(first, *ids.shape)
        return logits


@torch.inference_mode()
def check_exact(model: BaseModel) -> None:
    """Compare slots with the plain forward pass: two rows, chunked prefill, a step together. ~0.3 s, warms up as well.

    Raises ModelLoadFailed if they differ by more than rounding.
    """
    module: Any = model.module
    vocab = module.config.get_text_config().vocab_size
    long = [(7 + 31 * i) % vocab for i in range(CHECK_TOKENS)]
    short = [(5 + 17 * i) % vocab for i in range(CHECK_TOKENS // 2)]
    try:
        found, plain = _by_slots(model, [long, short]), _plainly(model, [long, short])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise ModelLoadFailed(detail=f"the engine cannot drive {model.name}: {error}") from error
    tolerance = 1e-3 if model.dtype is torch.float32 else 0.1
    if any(isinstance(child, Int8Linear) for child in module.modules()):
        tolerance = 0.3  # rounding in the last bit moves int8 activations by whole steps; a wrong mask shows as more
    difference = float((found - plain).abs().max() / plain.abs().max())
    if not difference <= tolerance:  # also if it is not a number
        detail = f"the engine would not serve {model.name} exactly (logits differ by {difference:.1%})"
        raise ModelLoadFailed(detail=detail)


def _by_slots(model: BaseModel, texts: Sequence[Sequence[int]]) -> Tensor:
    runner = Runner(model, max_rows=len(texts), context=CHECK_TOKENS)
    for ids in texts:
        row, half = runner.cache.add_row(), len(ids) // 2
        runner.prefill(row, ids[:half], None)
        runner.prefill(row, ids[half:-1], None)
    return runner.decode(0, [ids[-1] for ids in texts], [None] * len(texts)).float()


def _plainly(model: BaseModel, texts: Sequence[Sequence[int]]) -> Tensor:
    ids = (torch.tensor([list(text)], device=model.device) for text in texts)
    return torch.cat([model.module(input_ids=row, use_cache=False).logits[:, -1] for row in ids]).float()


def translate(error: Exception) -> AppError:
    """What a request hears of an error out of a forward pass."""
    if isinstance(error, AppError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return OutOfMemory(detail=str(error))
    return EngineError(detail=f"{type(error).__name__}: {error}")
