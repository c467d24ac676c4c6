"""The tokens of a pass grouped by adapter.

With compiled operators all tokens are one segment in tiles. Otherwise long runs of one adapter are segments of their
own, and short neighbours share one, whose mask separates their adapters. The mask's shape does not depend on the mix:
each shape would need a CUDA graph of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from cachetools import LRUCache
from torch import Tensor

from core.engine.cpu.compiled import CompiledOperators, tiles_of

Runs = tuple[tuple[int | None, int], ...]  # (slot, number of tokens) in turn; None is the base model

PLANS_KEPT = 8
LONG = 16  # tokens of one adapter in a row from which a segment of their own is faster than a mask


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Consecutive tokens of a pass, and the slots [start, stop) that they use.

    `tiles` or `foreign`, bool (T, stop - start, 1), separate the tokens by slot; with neither all use the one slot.
    """

    tokens: slice
    start: int
    stop: int
    foreign: Tensor | None = None
    tiles: Tensor | None = None


class SegmentPlanner:
    """The segments of each pass. `current` are those of the running one; tokens of the base model are in none."""

    def __init__(self, device: torch.device, operators: CompiledOperators | None) -> None:
        self.device = device
        self.operators = operators
        self.current: Sequence[LoraSegment] = ()
        self._plans: LRUCache[Runs, list[LoraSegment]] = LRUCache(PLANS_KEPT)  # they rarely differ between steps

    @contextmanager
    def segments(self, runs: Iterable[tuple[int | None, int]]) -> Iterator[Sequence[LoraSegment]]:
        """Apply adapters in the forward pass inside: (slot, number of tokens) in turn; None is the base model."""
        key = tuple(runs)
        if key not in self._plans:
            self._plans[key] = self._plan(key)
        self.current = self._plans[key]
        try:
            yield self.current
        finally:
            self.current = ()

    @contextmanager
    def masked(self, own: Tensor, slots: int) -> Iterator[Sequence[LoraSegment]]:
        """As `segments`, one token each, with slots (T,) on the device, -1 for the base model, all below `slots`."""
        self.current = [LoraSegment(slice(0, len(own)), 0, slots, foreign=_foreign(own, 0, slots))] if slots else []
        try:
            yield self.current
        finally:
            self.current = ()

    def _plan(self, runs: Runs) -> list[LoraSegment]:
        if self.operators is not None:
            return self._tiled([slot for slot, tokens in runs for _ in range(tokens)])
        segments: list[LoraSegment] = []
        short: list[int | None] = []
        token = 0
        for slot, group in groupby(runs, key=lambda run: run[0]):
            count = sum(tokens for _, tokens in group)
            if count < LONG:
                short += [slot] * count
            else:
                segments += self._short(token - len(short), short)
                segments += [] if slot is None else [LoraSegment(slice(token, token + count), slot, slot + 1)]
                short = []
            token += count
        return segments + self._short(token - len(short), short)

    def _tiled(self, slots: Sequence[int | None]) -> list[LoraSegment]:
        used = {slot for slot in slots if slot is not None}
        return [LoraSegment(slice(0, len(slots)), min(used), max(used) + 1, tiles=tiles_of(slots))] if used else []

    def _short(self, first: int, slots: Sequence[int | None]) -> list[LoraSegment]:
        """One segment for tokens of any slots, without base-model tokens at its ends."""
        places = [i for i, slot in enumerate(slots) if slot is not None]
        if not places:
            return []
        slots = slots[places[0] : places[-1] + 1]
        used = {slot for slot in slots if slot is not None}
        tokens = slice(first + places[0], first + places[0] + len(slots))
        start, stop = min(used), max(used) + 1
        if len(set(slots)) == 1:
            return [LoraSegment(tokens, start, stop)]
        own = torch.tensor([-1 if slot is None else slot for slot in slots], device=self.device)
        return [LoraSegment(tokens, start, stop, foreign=_foreign(own, start, stop))]


def _foreign(own: Tensor, start: int, stop: int) -> Tensor:
    """Slots of tokens (T,) -> bool (T, stop - start, 1): not the token's slot."""
    return (torch.arange(start, stop, device=own.device)[None, :] != own[:, None])[:, :, None]
