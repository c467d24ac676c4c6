"""LoRA for any mix of adapters in one batch: y = W x + B_cat (mask * (A_cat x)). Knows no requests and no text.

A_cat (S*R, in) and B_cat (out, S*R) stack the adapters that rows run with, one slot each, scale folded into B, lower
ranks padded with zeros; the mask keeps to each row its own slot. A pass whose rows all run bare computes nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from core.engine.adapter_files import AdapterWeights
from core.engine.int8 import Int8Linear, Part

LONG = 16  # tokens of one adapter in a row from which a slice of their own is quicker than a share of the mask


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a pass, the slots [start, stop) that they use, and which of these are foreign to each.

    foreign is bool (T, stop - start, 1), or None if all tokens run with the one slot that is used.
    """

    tokens: slice
    start: int
    stop: int
    foreign: Tensor | None


class Stack:
    """A_cat and B_cat of the linear modules that share an input, so that one product takes it in for all of them.

    a is (S * P * R, in): slot by slot, then module by module; b holds one (out, S * R) per module.
    """

    def __init__(
        self, in_features: int, outs: Sequence[int], plans: PlanHolder, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.plans = plans
        self.outs = tuple(outs)
        self.rank = 0
        self.a = torch.zeros(0, in_features, device=device, dtype=dtype)
        self.b = [torch.zeros(out, 0, device=device, dtype=dtype) for out in outs]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """As a forward hook of the one module."""
        self.add(inputs[0], output)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add to y (..., sum of outs), in place, what the plan's adapters make of x (..., in); tokens in any shape."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for piece in self.plans.current:
            self._add(piece, x[piece.tokens], y[piece.tokens])

    def _add(self, piece: Piece, x: Tensor, y: Tensor) -> None:
        parts, rank, slots = len(self.outs), self.rank, piece.stop - piece.start
        h = nn.functional.linear(x, self.a[piece.start * parts * rank : piece.stop * parts * rank])
        h = h.view(len(x), slots, parts * rank)
        if piece.foreign is not None:
            # Filled, not multiplied: another tenant's overflow times zero would be NaN.
            h.masked_fill_(piece.foreign, 0.0)
        column = 0
        for part, (out, b) in enumerate(zip(self.outs, self.b, strict=True)):
            own = h[..., part * rank : (part + 1) * rank].reshape(len(x), slots * rank)
            y[:, column : column + out].addmm_(own, b[:, piece.start * rank : piece.stop * rank].t())
            column += out

    def resize(self, slots: int, rank: int) -> None:
        """Another number of slots or rank; what is there stays in its slot."""
        parts, old_rank = len(self.outs), self.rank
        a = self.a.new_zeros(slots, parts, rank, self.a.shape[1])
        if old_rank and len(self.a):
            old = self.a.view(-1, parts, old_rank, self.a.shape[1])
            a[: len(old), :, :old_rank] = old
        self.a, self.rank = a.flatten(0, 2), rank
        self.b = [_resized(b, slots, rank, old_rank) for b in self.b]

    def fill(self, slot: int, part: int, a: Tensor, b: Tensor) -> None:
        """Put one module's A (r, in) and B (out, r) into a slot that is zero."""
        start = (slot * len(self.outs) + part) * self.rank
        self.a[start : start + len(a)].copy_(a)
        self.b[part][:, slot * self.rank : slot * self.rank + len(a)].copy_(b)

    def zero(self, slot: int) -> None:
        size = len(self.outs) * self.rank
        self.a[slot * size : (slot + 1) * size] = 0
        for b in self.b:
            b[:, slot * self.rank : (slot + 1) * self.rank] = 0


def _resized(b: Tensor, slots: int, rank: int, old_rank: int) -> Tensor:
    new = b.new_zeros(len(b), slots, rank)
    if old_rank and b.shape[1]:
        old = b.view(len(b), -1, old_rank)
        new[:, : old.shape[1], :old_rank] = old
    return new.flatten(1, 2)


class PlanHolder:
    """The plan of the running pass, as the hooks see it: tokens that run bare are in no piece."""

    current: Sequence[Piece] = ()


class LoraStacks:
    """The slots: which adapter lies in which, and who uses it. All methods belong to the model thread."""

    def __init__(
        self,
        module: nn.Module,
        *,
        max_slots: int,
        device: torch.device,
        dtype: torch.dtype,
        groups: Sequence[tuple[str, ...]] = (),
    ) -> None:
        """`groups` are the modules whose products are merged, in order; they are given their part by `add`."""
        self.linears = dict(linear_modules(module))
        self.max_slots, self.device, self.dtype = max_slots, device, dtype
        self.plans = PlanHolder()
        self.merged = bool(groups)
        self.places = {name: (group, part) for group in groups for part, name in enumerate(group)}
        self.stacks: dict[str, Stack] = {}  # by the first module of the group
        self.slots: dict[str, int] = {}  # adapter sha256 -> slot, least recently used first
        self.users: Counter[str] = Counter()
        self.slot_count, self.rank = 0, 0

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Add to y, in place, what the running pass's adapters make of x in the group that begins with `name`."""
        stack = self.stacks.get(name)
        if stack is not None:
            stack.add(x, y)

    def acquire(self, adapter: AdapterWeights) -> int:
        """The adapter's slot, filled if need be, held until `release`. At most max_slots different ones at a time."""
        key = adapter.sha256
        slot = self.slots.pop(key, None)
        if slot is None:
            slot = self._free_slot()
            try:
                self._fill(slot, adapter)
            except BaseException:
                self._zero(slot)
                raise
        self.slots[key] = slot
        self.users[key] += 1
        return slot

    def release(self, key: str) -> None:
        """One user less. The adapter stays in its slot until another one needs it."""
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]

    @contextmanager
    def tokens(self, runs: Sequence[tuple[int | None, int]]) -> Iterator[Sequence[Piece]]:
        """Let the forward pass inside run its tokens with adapters: (slot, how many tokens) in turn; None is bare."""
        self.plans.current = self._plan(runs)
        try:
            yield self.plans.current
        finally:
            self.plans.current = ()

    def _plan(self, runs: Sequence[tuple[int | None, int]]) -> list[Piece]:
        """Long runs of one adapter are pieces of their own; short neighbours share one, under a mask."""
        pieces, short, token = [], [], 0
        for slot, group in groupby(runs, key=lambda run: run[0]):
            count = sum(tokens for _, tokens in group)
            if count < LONG:
                short += [slot] * count
            else:
                pieces += [self._masked(token - len(short), short)] if short else []
                pieces += [] if slot is None else [Piece(slice(token, token + count), slot, slot + 1, None)]
                short = []
            token += count
        pieces += [self._masked(token - len(short), short)] if short else []
        return [piece for piece in pieces if piece is not None]

    def _masked(self, first: int, slots: Sequence[int | None]) -> Piece | None:
        """One piece for tokens of any slots."""
        used = {slot for slot in slots if slot is not None}
        if not used:
            return None
        low, high = min(used), max(used) + 1
        foreign = None
        if len(set(slots)) > 1:
            own = torch.tensor([-1 if slot is None else slot for slot in slots], device=self.device)
            foreign = (torch.arange(low, high, device=self.device)[None, :] != own[:, None])[:, :, None]
        return Piece(slice(first, first + len(slots)), low, high, foreign)

    def _free_slot(self) -> int:
        taken = set(self.slots.values())
        free = next((slot for slot in range(self.slot_count) if slot not in taken), None)
        if free is not None:
            return free
        idle = next((key for key in self.slots if key not in self.users), None)
        if idle is not None and self.slot_count == self.max_slots:
            slot = self.slots.pop(idle)
            self._zero(slot)
            return slot
        assert self.slot_count < self.max_slots
        self._resize(min(max(1, 2 * self.slot_count), self.max_slots), self.rank)
        return self._free_slot()

    def _fill(self, slot: int, adapter: AdapterWeights) -> None:
        if adapter.rank > self.rank:
            self._resize(self.slot_count, adapter.rank)
        for name, (a, b) in adapter.pairs.items():
            group, part = self.places.get(name, ((name,), 0))
            self._stack(group).fill(slot, part, a, b)

    def _stack(self, group: tuple[str, ...]) -> Stack:
        stack = self.stacks.get(group[0])
        if stack is None:
            linears = [self.linears[name] for name in group]
            outs = [linear.out_features for linear in linears]
            stack = Stack(linears[0].in_features, outs, self.plans, device=self.device, dtype=self.dtype)
            stack.resize(self.slot_count, self.rank)
            if not self.merged:
                linears[0].register_forward_hook(stack)
            self.stacks[group[0]] = stack
        return stack

    def _zero(self, slot: int) -> None:
        for stack in self.stacks.values():
            stack.zero(slot)

    def _resize(self, slots: int, rank: int) -> None:
        for stack in self.stacks.values():
            stack.resize(slots, rank)
        self.slot_count, self.rank = slots, rank


def linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Linear | Int8Linear | Part]]:
    """The modules that an adapter may change, by name: linear ones that see (B, T, in)."""
    text = module.config.get_text_config()  # type: ignore[union-attr, operator]  # a transformers model
    experts = any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    for name, child in module.named_modules():
        # Inside a mixture of experts tokens are regrouped, so a row is no longer the first dimension.
        if isinstance(child, nn.Linear | Int8Linear | Part) and (not experts or "attn" in name or "attention" in name):
            yield name, child


def shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that an adapter may change."""
    return {name: (child.out_features, child.in_features) for name, child in linear_modules(module)}
