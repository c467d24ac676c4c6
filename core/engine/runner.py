"""Forward passes over rows: single tokens of many beside chunks of prompts. Knows no requests, fairness or text.

Exactness is proved at load: what comes out of slots, chunks and mixed passes is compared with the model's own plain
forward pass, so a model whose attention works otherwise is refused, whatever its configuration says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.engine.fused import fuse
from core.engine.int8 import Int8Linear
from core.engine.kv import Segment, SlotCache
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
        self.positions_read = self.positions_held = 0  # as in EngineStats

    def run(self, first: int, parts: Sequence[Sequence[int]], slots: Sequence[int | None]) -> Tensor:
        """Take in the next ids of each of the rows [first, first + B), row i with the adapter in slots[i].

        parts[i] are one id or more, of any number: prompts' chunks go with other rows' single tokens. Returns logits
        (B, V) after the last of each. After an error the rows are as they were before.
        """
        counts = [len(part) for part in parts]
        segments = self.cache.begin(first, counts, self.device)
        ids = torch.tensor([one for part in parts for one in part], device=self.device)
        runs = list(zip(slots, counts, strict=True))
        logits = self._plain(ids, segments, runs) if self.fused is None else self._fused(ids, segments, runs)
        self.cache.advance(first, counts)
        self.positions_read += sum(one.rows * one.length for one in segments)
        self.positions_held += sum(self.cache.used[first : first + len(counts)])
        return logits

    def _fused(self, ids: Tensor, segments: Sequence[Segment], runs: Sequence[tuple[int | None, int]]) -> Tensor:
        assert self.fused is not None
        with self.lora.tokens(runs) as plan:
            states = self.fused.states(ids, segments, self.cache, self.lora.add if plan else None)
        with self.lora.tokens([(slot, 1) for slot, _ in runs]) as plan:
            return self.fused.logits(states, self.lora.add if plan else None)

    def _plain(self, ids: Tensor, segments: Sequence[Segment], runs: Sequence[tuple[int | None, int]]) -> Tensor:
        logits, begin = [], 0
        for segment in segments:
            self.cache.window.segment = segment
            with self.lora.tokens(runs[begin : begin + segment.rows]):
                out = self.module(
                    input_ids=ids[segment.tokens].view(segment.rows, -1),
                    attention_mask=segment.mask,
                    position_ids=segment.positions,
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            logits.append(out.logits[:, -1])
            begin += segment.rows
        return torch.cat(logits)


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
    long, short = texts
    half, few = len(long) // 2, len(short) // 2
    runner.run(runner.cache.add_row(), [long[:half]], [None])
    runner.run(runner.cache.add_row(), [short[:few]], [None])
    runner.run(0, [long[half : half + 1], short[few:-1]], [None, None])  # one row's step beside another's chunk
    runner.run(0, [long[half + 1 : -1]], [None])
    return runner.run(0, [long[-1:], short[-1:]], [None, None]).float()


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
