"""Forward passes over KV slots: single tokens of many rows beside chunks of prompts.

Llama-like models run core.engine.runtime.fused, on a CPU with compiled operators in one call
(core.engine.runtime.compiled_layers); other models run their own forward pass. core.engine.diagnostics.parity checks at
load that each gives the model's own numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.engine.cpu.lazy_zeros import lazy_zeros_available
from core.engine.lora.slots import AdapterSlots
from core.engine.out_of_memory import is_out_of_memory
from core.engine.runtime.compiled_layers import CompiledLayers, compiled_layers
from core.engine.runtime.cuda_graphs import DecodeGraphs, GraphShape
from core.engine.runtime.fused import fuse
from core.engine.runtime.kv_cache import SlotCache, SlotSegment, segment_scope
from core.errors import AppError, EngineError, OutOfMemory
from core.model.base import BaseModel, attends_by_mask


class Runner:
    """The model with its KV cache and adapter slots. All methods belong to one thread.

    At most `adapters` different ones run at once; 0 is one per row. `static` runs decode steps over static buffers
    (core.engine.runtime.cuda_graphs); None means on a GPU.
    """

    def __init__(
        self, model: BaseModel, *, max_rows: int, context: int, adapters: int = 0, static: bool | None = None
    ) -> None:
        module: Any = model.module
        self.module = module
        self.device = model.device
        layers: int = module.config.get_text_config().num_hidden_layers
        static = self.device.type == "cuda" if static is None else static
        self.fused = fuse(model.module)
        self.by_mask = attends_by_mask(module.config)
        on_cpu = self.device.type == "cpu"
        self.cache = SlotCache(
            layers,
            max_rows=max_rows,
            max_length=context,
            spare=static,
            lazy=on_cpu and not static and lazy_zeros_available(),
        )
        self.lora = AdapterSlots(
            model.module,
            max_slots=min(adapters or max_rows, max_rows),
            device=model.device,
            dtype=model.dtype,
            groups=self.fused.groups if self.fused else (),
        )
        self.layers = None if self.fused is None or static else compiled_layers(self.fused, self.cache, self.lora)
        self.steps = DecodeGraphs(self._step, self.cache, self.lora, device=self.device) if static else None
        self.positions_read = self.positions_held = 0  # as in EngineStats

    def run(self, first: int, parts: Sequence[Sequence[int]], slots: Sequence[int | None]) -> Tensor:
        """Compute the next ids of each of the rows [first, first + B), row i with the adapter in slots[i].

        parts[i] holds one id or more: chunks of prompts run beside single tokens of other rows. Returns logits (B, V)
        after the last id of each, valid until the next call. After an error the rows are as before.
        """
        counts = [len(part) for part in parts]
        if self.steps is not None and first == 0 and max(counts) == 1:
            self.cache.touch(len(parts))
            found = self.steps.run([part[0] for part in parts], slots)
            if found is not None:
                self.cache.advance(0, counts)
                self.positions_read += self.steps.shape.rows * self.steps.shape.length
                self.positions_held += sum(self.cache.used[: len(counts)])
                return found
        ids = torch.tensor([one for part in parts for one in part], device=self.device)
        runs = list(zip(slots, counts, strict=True))
        if self.layers is not None:
            logits, read = self._in_one(self.layers, ids, first, runs), 0
        else:
            segments = self.cache.begin(first, counts, self.device)
            logits = self._plain(ids, segments, runs) if self.fused is None else self._fused(ids, segments, runs)
            read = sum(segment.rows * segment.length for segment in segments)
        self.cache.advance(first, counts)
        held = sum(self.cache.used[first : first + len(counts)])
        self.positions_read += read or held  # the compiled layers read no padding
        self.positions_held += held
        return logits

    def _step(self, inputs: Tensor, shape: GraphShape) -> Tensor:
        """One token of each row, entirely on the device: what graphs capture."""
        ids, positions, row_index, own = inputs
        segment = self.cache.static(positions, row_index, shape.length)
        with self.lora.planner.masked(own, shape.slots) as plan:
            if self.fused is not None:
                add = self.lora.add if plan else None
                return self.fused.logits(self.fused.states(ids, [segment], self.cache, add), add)
            return self._own(ids, segment)

    def _in_one(
        self, layers: CompiledLayers, ids: Tensor, first: int, runs: Sequence[tuple[int | None, int]]
    ) -> Tensor:
        assert self.fused is not None
        counts = [count for _, count in runs]
        used = self.cache.enter(first, counts)
        rows = [(first + i, start, count, 0, 0) for i, (start, count) in enumerate(zip(used, counts, strict=True))]
        positions = torch.tensor([start + i for start, count in zip(used, counts, strict=True) for i in range(count)])
        with self.lora.planner.segments(runs) as plan:
            states = layers(*self.fused.begin(ids, positions), torch.tensor(rows), plan[0].tiles if plan else None)
        with self.lora.planner.segments([(slot, 1) for slot, _ in runs]) as plan:
            return self.fused.logits(states, self.lora.add if plan else None)

    def _fused(self, ids: Tensor, segments: Sequence[SlotSegment], runs: Sequence[tuple[int | None, int]]) -> Tensor:
        assert self.fused is not None
        with self.lora.planner.segments(runs) as plan:
            states = self.fused.states(ids, segments, self.cache, self.lora.add if plan else None)
        with self.lora.planner.segments([(slot, 1) for slot, _ in runs]) as plan:
            return self.fused.logits(states, self.lora.add if plan else None)

    def _plain(self, ids: Tensor, segments: Sequence[SlotSegment], runs: Sequence[tuple[int | None, int]]) -> Tensor:
        logits, begin = [], 0
        for segment in segments:
            with self.lora.planner.segments(runs[begin : begin + segment.rows]):
                logits.append(self._own(ids[segment.tokens], segment))
            begin += segment.rows
        return torch.cat(logits)

    def _own(self, ids: Tensor, segment: SlotSegment) -> Tensor:
        """The model's own forward pass: (rows, V) after the last token of each."""
        with segment_scope(segment):
            out = self.module(
                input_ids=ids.view(segment.rows, -1),
                attention_mask=segment.bias(None, 1, 1, self.module.dtype) if self.by_mask else segment.mask,
                position_ids=segment.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[:, -1]
        return logits


def translate(error: BaseException) -> AppError:
    """The error that a request gets for an error of a forward pass."""
    if isinstance(error, AppError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(detail=str(error))
    return EngineError(detail=f"{type(error).__name__}: {error}")
