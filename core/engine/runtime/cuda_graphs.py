"""Decode steps over static buffers, captured as CUDA graphs and replayed on a GPU.

A step launches hundreds of kernels of a few microseconds each; a replayed graph costs no host time. A graph is valid
for one shape and for the tensors it was captured with, so its key holds the whole shape, and all graphs are dropped
when the KV cache or the adapter slots are reallocated. Without a GPU the same step runs uncaptured, which is how the
static buffers are tested.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from core.engine.lora.slots import AdapterSlots
from core.engine.runtime.kv_cache import SlotCache

log = logging.getLogger(__name__)

MAX_GRAPHS = 96  # they share a memory pool, so each is small


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Everything that decides which kernels a step launches, and over what.

    `rows` of the cache with `length` keys each; adapter slots [0, slots) of `rank` are multiplied, none if all rows run
    the base model.
    """

    rows: int
    length: int
    slots: int
    rank: int


# inputs int64 (4, rows): ids, positions, the cache row to write, the adapter slot or -1; -> logits (rows, V)
Step = Callable[[Tensor, GraphShape], Tensor]


class DecodeGraphs:
    """The captured decode steps of one runner. All methods belong to the model thread."""

    def __init__(self, step: Step, cache: SlotCache, lora: AdapterSlots, *, device: torch.device) -> None:
        self.step, self.cache, self.lora, self.device = step, cache, lora, device
        self.captures = device.type == "cuda"
        self.usable = True
        self.graphs: LRUCache[GraphShape, torch.cuda.CUDAGraph | None] = LRUCache(MAX_GRAPHS)
        self.refused: set[GraphShape] = set()  # captures that ran out of memory
        self.shape = GraphShape(0, 0, 0, 0)  # of the last step
        self._versions = (cache.version, lora.version)
        self._host = torch.zeros(4, cache.max_rows, dtype=torch.long, pin_memory=self.captures)
        self._inputs = torch.zeros(4, cache.max_rows, dtype=torch.long, device=device)
        self._logits: Tensor | None = None  # (max_rows, V)
        self._copied = torch.cuda.Event() if self.captures else None  # type: ignore[no-untyped-call]  # torch's
        self._stream = torch.cuda.Stream(self.device) if self.captures else None  # type: ignore[no-untyped-call]  # torch's
        self._pool = self._new_pool()

    def run(self, ids: Sequence[int], slots: Sequence[int | None]) -> Tensor | None:
        """Compute one id of each of the first rows. Returns logits (B, V), valid until the next call.

        None if this shape cannot be captured; nothing has happened then.
        """
        if not self.usable:
            return None
        positions = self.cache.used[: len(ids)]
        self.cache.reserve(max(positions) + 1)
        if self._versions != (self.cache.version, self.lora.version):
            self._drop()
        shape = self._shape(len(ids), max(positions) + 1, slots)
        if shape in self.refused:
            return None
        self._fill(shape, ids, positions, slots)
        if shape not in self.graphs and not self._add(shape):
            return None
        self.shape = shape
        graph = self.graphs[shape]
        if graph is None:
            self._compute(shape)
        else:
            graph.replay()
        assert self._logits is not None
        return self._logits[: len(ids)]

    def _shape(self, rows: int, length: int, slots: Sequence[int | None]) -> GraphShape:
        used = max((slot + 1 for slot in slots if slot is not None), default=0)
        return GraphShape(
            min(row_bucket(rows), self.cache.slots),
            min(length_bucket(length), self.cache.length),
            min(1 << (used - 1).bit_length(), self.lora.slot_count) if used else 0,
            self.lora.rank if used else 0,
        )

    def _fill(
        self, shape: GraphShape, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int | None]
    ) -> None:
        """Copy the inputs to the device at once. Padding rows write to the spare slot, and their logits are dropped."""
        if self._copied is not None:
            self._copied.synchronize()  # of the previous call, long done
        rest = shape.rows - len(ids)
        self._host[:, : shape.rows] = torch.tensor(
            [
                [*ids, *[0] * rest],
                [*positions, *[0] * rest],
                [*range(len(ids)), *[self.cache.slots] * rest],
                [*(-1 if slot is None else slot for slot in slots), *[-1] * rest],
            ]
        )
        self._inputs.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))

    def _compute(self, shape: GraphShape) -> None:
        logits = self.step(self._inputs[:, : shape.rows], shape)
        if self._logits is None:
            self._logits = logits.new_empty(self.cache.max_rows, logits.shape[1])
        self._logits[: shape.rows] = logits  # the next graph overwrites the shared pool

    def _add(self, shape: GraphShape) -> bool:
        """Capture a step; False if that failed. Running it twice writes the same keys and values twice."""
        if not self.captures:
            self.graphs[shape] = None
        else:
            try:
                self.graphs[shape] = self._capture(shape)
            except torch.OutOfMemoryError as error:
                log.warning("engine.graph_no_memory", extra={"shape": str(shape), "reason": str(error)[:200]})
                self._forget_graphs()
                self.refused.add(shape)
                return False
            except RuntimeError as error:  # such as an operator that synchronizes with the host
                log.warning("engine.graphs_off", extra={"shape": str(shape), "reason": str(error)[:500]})
                self._drop()
                self.usable = False
                return False
        return True

    def _capture(self, shape: GraphShape) -> torch.cuda.CUDAGraph:
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._compute(shape)  # libraries allocate their workspaces outside of the graph
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(
                torch.cuda.current_stream(self.device)
            ),  # torch stays on the other stream if a capture fails
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._compute(shape)
        return graph

    def _drop(self) -> None:
        """Drop captures, and refusals, of another layout."""
        self._forget_graphs()
        self.refused.clear()
        self._versions = (self.cache.version, self.lora.version)

    def _forget_graphs(self) -> None:
        self.graphs.clear()
        self._pool = self._new_pool()  # torch drops a pool with its last graph and cannot reuse it

    def _new_pool(self) -> Any:  # the type of the handle is not public
        return torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None


def row_bucket(rows: int) -> int:
    """1, 2, 4, 8, then multiples of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def length_bucket(length: int) -> int:
    """Multiples of 128 up to 512, then four per doubling: at most a quarter of the keys read is padding."""
    step = max(128, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
