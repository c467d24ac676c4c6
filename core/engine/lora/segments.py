"""The tokens of a pass grouped by adapter.

With compiled operators all tokens are one segment in tiles. Otherwise long runs of one adapter are segments of their
own, short neighbours share one, and a shared segment separates its adapters in one of two ways: on a CPU by groups, one
per slot (a decode step may order its tokens so that the groups are contiguous, see TokenOrder); on a GPU by a mask,
whose shape does not depend on the mix, since each shape needs a CUDA graph of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from core.engine.cpu.compiled import CompiledOperators, tiles_of

Runs = tuple[tuple[int | None, int], ...]  # (slot, how many tokens) in turn; None is bare

PLANS_KEPT = 8
LONG = 16  # tokens of one adapter in a row from which a slice of their own is quicker than a share of the mask


@dataclass(frozen=True, slots=True)
class SlotGroups:
    """Tokens of a segment by slot: they lie so already, in groups of one length, or `permutation` bring them there."""

    slots: slice | Tensor
    permutation: Permutation | None = None


@dataclass(frozen=True, slots=True)
class Permutation:
    """All groups are made as long as the longest; what fills them is not used."""

    gather: Tensor  # (slots * longest,), the token at each place
    place: Tensor  # (T,), where each token's result lies
    bare: Tensor | None  # bool (T, 1), tokens that run with none


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """The rows' tokens in an order of their own."""

    rows: Sequence[int]
    there: Tensor  # (T,), the row of each token
    back: Tensor  # (T,), where each row's token lies


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Consecutive tokens of a pass, and the slots [start, stop) that they use.

    Each has its own by `groups`, by `foreign`, bool (T, stop - start, 1), or by `tiles`; by none
    of them, if all use the one slot.
    """

    tokens: slice
    start: int
    stop: int
    groups: SlotGroups | None = None
    foreign: Tensor | None = None
    tiles: Tensor | None = None


class SegmentPlanner:
    """The segments of each pass. `current` are those of the running one: tokens that run bare are in none."""

    def __init__(self, device: torch.device, operators: CompiledOperators | None) -> None:
        self.device = device
        self.operators = operators
        self.grouped = device.type == "cpu"
        self.current: Sequence[LoraSegment] = ()
        self._kept: dict[Runs, list[LoraSegment]] = {}  # of the last passes: from step to step they are mostly the same
        self._ordered_for: list[int | None] = []
        self._order: TokenOrder | None = None

    @contextmanager
    def segments(self, runs: Iterable[tuple[int | None, int]]) -> Iterator[Sequence[LoraSegment]]:
        """Let the forward pass inside run its tokens with adapters: (slot, how many tokens) in turn; None is bare."""
        key = tuple(runs)
        if key not in self._kept:
            if len(self._kept) == PLANS_KEPT:
                self._kept.clear()
            self._kept[key] = self._plan(key)
        self.current = self._kept[key]
        try:
            yield self.current
        finally:
            self.current = ()

    @contextmanager
    def masked(self, own: Tensor, slots: int) -> Iterator[Sequence[LoraSegment]]:
        """As `tokens`, one token each, with slots (T,) that the device alone knows, -1 for bare, all below `slots`."""
        foreign = (torch.arange(slots, device=own.device)[None, :] != own[:, None])[:, :, None]
        self.current = [LoraSegment(slice(0, len(own)), 0, slots, foreign=foreign)] if slots else []
        try:
            yield self.current
        finally:
            self.current = ()

    def order(self, slots: Sequence[int | None]) -> TokenOrder | None:
        """How to order one token of each row so that none is moved for its adapter's sake; None: as they are."""
        if list(slots) != self._ordered_for:
            self._ordered_for, self._order = list(slots), self._find_order(slots)
        return self._order

    def _find_order(self, slots: Sequence[int | None]) -> TokenOrder | None:
        order = sorted(range(len(slots)), key=lambda row: (slots[row] is None, slots[row] or 0))
        if not self.grouped or self.operators is not None or order == list(range(len(slots))):
            return None
        if any(
            segment.groups and segment.groups.permutation
            for segment in self._plan(tuple((slots[row], 1) for row in order))
        ):
            return None
        back = sorted(range(len(order)), key=order.__getitem__)
        return TokenOrder(order, torch.tensor(order, device=self.device), torch.tensor(back, device=self.device))

    def _plan(self, runs: Runs) -> list[LoraSegment]:
        if self.operators is not None:
            return self._tiled([slot for slot, tokens in runs for _ in range(tokens)])
        segments, short, token = [], [], 0
        for slot, group in groupby(runs, key=lambda run: run[0]):
            count = sum(tokens for _, tokens in group)
            if count < LONG:
                short += [slot] * count
            else:
                segments += [self._short(token - len(short), short)] if short else []
                segments += [] if slot is None else [LoraSegment(slice(token, token + count), slot, slot + 1)]
                short = []
            token += count
        segments += [self._short(token - len(short), short)] if short else []
        return [segment for segment in segments if segment is not None]

    def _tiled(self, slots: Sequence[int | None]) -> list[LoraSegment]:
        used = {slot for slot in slots if slot is not None}
        return [LoraSegment(slice(0, len(slots)), min(used), max(used) + 1, tiles=tiles_of(slots))] if used else []

    def _short(self, first: int, slots: Sequence[int | None]) -> LoraSegment | None:
        """One segment for tokens of any slots; bare ones at its ends are left out."""
        used = {slot for slot in slots if slot is not None}
        if not used:
            return None
        while slots[-1] is None:
            slots = slots[:-1]
        while slots[0] is None:
            first, slots = first + 1, slots[1:]
        tokens, start, stop = slice(first, first + len(slots)), min(used), max(used) + 1
        if len(set(slots)) == 1:
            return LoraSegment(tokens, start, stop)
        if self.grouped:
            return LoraSegment(tokens, start, stop, groups=self._groups(slots, sorted(used)))
        own = torch.tensor([-1 if slot is None else slot for slot in slots], device=self.device)
        foreign = torch.arange(start, stop, device=self.device)[None, :] != own[:, None]
        return LoraSegment(tokens, start, stop, foreign=foreign[:, :, None])

    def _groups(self, slots: Sequence[int | None], used: Sequence[int]) -> SlotGroups:
        """`used` in order; slots that lie close together are a view, with empty groups for those between."""
        span = range(used[0], used[-1] + 1)
        dense = len(span) <= 2 * len(used)
        number = {slot: i for i, slot in enumerate(span if dense else used)}
        sizes = Counter(slots)
        longest = max(size for slot, size in sizes.items() if slot is not None)
        chosen = slice(span.start, span.stop) if dense else torch.tensor(used, device=self.device)
        if list(slots) == [slot for slot in number for _ in range(longest)]:
            return SlotGroups(chosen)
        gather, place, filled = [0] * (len(number) * longest), [0] * len(slots), Counter[int]()
        for token, slot in enumerate(slots):
            if slot is not None:
                place[token] = number[slot] * longest + filled[slot]
                gather[place[token]] = token
                filled[slot] += 1
        bare = torch.tensor([slot is None for slot in slots], device=self.device)[:, None] if None in slots else None
        permutation = Permutation(
            torch.tensor(gather, device=self.device), torch.tensor(place, device=self.device), bare
        )
        return SlotGroups(chosen, permutation)
