"""LoRA for any mix of adapters in one batch: y = W x + B (A x), each row with its own. Knows no requests and no text.

A (S*R, in) and B (S*R, out) stack the adapters that rows run with, one slot each, scale folded into B, lower ranks
padded with zeros. There are three ways to the same numbers. One adapter: its slice. Many, on a CPU: rows are gathered
in groups, one per slot, and multiplied group by group; a pass may take its tokens in an `Order` in which they lie so
already. Many, on a GPU: all slots for all rows, and a mask that keeps to each row its own slot: more arithmetic, but of
one shape whatever the mix. Rows that run bare alone compute nothing.

Measured on one Zen 5 core over all products of a layer of SmolLM2-135M: groups take 0.69 to 1.09 of the mask's time
with 2 adapters (less with more rows and higher ranks), half of it with 8, a quarter with 32. So a CPU never masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core.engine.adapter_files import AdapterWeights
from core.engine.int8 import Int8Linear, Part
from core.engine.shortage import is_shortage

Runs = tuple[tuple[int | None, int], ...]  # (slot, how many tokens) in turn; None is bare

PLANS_KEPT = 8
MOST_PADDED = 4  # times the rank that the adapters in use need: from there on all are laid out anew
LONG = 16  # tokens of one adapter in a row from which a slice of their own is quicker than a share of the mask


@dataclass(frozen=True, slots=True)
class Groups:
    """Tokens of a piece by slot: they lie so already, in groups of one length, or `moves` bring them there."""

    slots: slice | Tensor
    moves: Moves | None = None


@dataclass(frozen=True, slots=True)
class Moves:
    """All groups are made as long as the longest; what fills them is not used."""

    gather: Tensor  # (slots * longest,), the token at each place
    place: Tensor  # (T,), where each token's result lies
    bare: Tensor | None  # bool (T, 1), tokens that run with none


@dataclass(frozen=True, slots=True)
class Order:
    """The rows' tokens in an order of their own."""

    rows: Sequence[int]
    there: Tensor  # (T,), the row of each token
    back: Tensor  # (T,), where each row's token lies


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a pass, and the slots [start, stop) that they use.

    Each has its own by `groups`, or by `foreign`, bool (T, stop - start, 1); neither, if all use the one slot.
    """

    tokens: slice
    start: int
    stop: int
    groups: Groups | None = None
    foreign: Tensor | None = None


class Stack:
    """A and B of the linear modules that share an input, so that one product takes it in for all of them.

    a is (S, P * R, in), module by module within a slot. b holds one (S, R, out) per module; or, `joined`, a single
    (S, P * R, sum of outs), zero but for the modules' own blocks: more to multiply, in fewer products, which is what a
    CPU's time goes by.
    """

    def __init__(
        self,
        in_features: int,
        outs: Sequence[int],
        plans: PlanHolder,
        *,
        device: torch.device,
        dtype: torch.dtype,
        joined: bool,
    ) -> None:
        self.plans = plans
        self.outs, self.joined = tuple(outs), joined
        self.widths = (sum(outs),) if joined else self.outs  # of the tensors in b
        self.rank = 0
        self.a = torch.zeros(0, 0, in_features, device=device, dtype=dtype)
        self.b = [torch.zeros(0, 0, width, device=device, dtype=dtype) for width in self.widths]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """As a forward hook of the one module."""
        self.add(inputs[0], output)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add to y (..., sum of outs), in place, what the plan's adapters make of x (..., in); tokens in any shape."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for piece in self.plans.current:
            ys = y[piece.tokens].split_with_sizes(self.widths, dim=1)
            if piece.groups is not None:
                self._add_groups(piece.groups, x[piece.tokens], ys)
            else:
                self._add_masked(piece, x[piece.tokens], ys)

    def _add_groups(self, groups: Groups, x: Tensor, ys: Sequence[Tensor]) -> None:
        a, moves = self.a[groups.slots], groups.moves
        x = x if moves is None else x.index_select(0, moves.gather)
        h = torch.bmm(x.view(len(a), -1, x.shape[1]), a.transpose(1, 2))
        for y, b, own in zip(ys, self.b, h.chunk(len(ys), dim=2), strict=True):
            if moves is None:
                y.view(len(a), -1, y.shape[1]).baddbmm_(own, b[groups.slots])
                continue
            added = torch.bmm(own, b[groups.slots]).view(-1, y.shape[1]).index_select(0, moves.place)
            y += added if moves.bare is None else added.masked_fill_(moves.bare, 0.0)

    def _add_masked(self, piece: Piece, x: Tensor, ys: Sequence[Tensor]) -> None:
        slots = slice(piece.start, piece.stop)
        h = nn.functional.linear(x, self.a[slots].flatten(0, 1)).view(len(x), piece.stop - piece.start, -1)
        if piece.foreign is not None:
            # Filled, not multiplied: another tenant's overflow times zero would be NaN.
            h.masked_fill_(piece.foreign, 0.0)
        for y, b, own in zip(ys, self.b, h.chunk(len(ys), dim=2), strict=True):
            y.addmm_(own.flatten(1), b[slots].flatten(0, 1))

    def resize(self, slots: int, rank: int) -> None:
        """Other slots or another rank; what fits stays in its slot. All of it or, without memory, nothing."""
        if (slots, rank) == (len(self.a), self.rank):
            return  # already, when another stack found no memory
        a = _resized(self.a, len(self.outs), slots, rank)
        b = [_resized(old, len(self.outs) if self.joined else 1, slots, rank) for old in self.b]
        self.a, self.b, self.rank = a, b, rank

    def fill(self, slot: int, part: int, a: Tensor, b: Tensor) -> None:
        """Put one module's A (r, in) and B (out, r) into a slot that is zero."""
        start = part * self.rank
        self.a[slot, start : start + len(a)].copy_(a)
        if self.joined:
            column = sum(self.outs[:part])
            self.b[0][slot, start : start + len(a), column : column + len(b)].copy_(b.t())
        else:
            self.b[part][slot, : len(a)].copy_(b.t())

    def zero(self, slot: int) -> None:
        for tensor in (self.a, *self.b):
            tensor[slot] = 0


def _resized(old: Tensor, parts: int, slots: int, rank: int) -> Tensor:
    """(S, P * R, n) for other slots and another rank."""
    old = old.view(len(old), parts, old.shape[1] // parts, old.shape[2])
    kept = old[:slots, :, :rank]
    new = old.new_zeros(slots, parts, rank, old.shape[3])
    new[: len(kept), :, : kept.shape[2]] = kept
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
        self.grouped = device.type == "cpu"  # on a GPU a shape for every mix would be a graph for every mix
        self.plans = PlanHolder()
        self._plans: dict[Runs, list[Piece]] = {}  # of the last passes: from step to step they are mostly the same
        self._ordered_for: list[int | None] = []
        self._order: Order | None = None
        self.merged = bool(groups)
        self.places = {name: (group, part) for group in groups for part, name in enumerate(group)}
        self.stacks: dict[str, Stack] = {}  # by the first module of the group
        self.hooks: list[RemovableHandle] = []  # of a model that runs its own forward
        self.slots: dict[str, int] = {}  # adapter sha256 -> slot, least recently used first
        self.ranks: dict[str, int] = {}  # of those in the slots
        self.users: Counter[str] = Counter()
        self.slot_count, self.rank = 0, 0
        self.version = 0  # of the tensors: another one, other tensors

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Add to y, in place, what the running pass's adapters make of x in the group that begins with `name`."""
        stack = self.stacks.get(name)
        if stack is not None:
            stack.add(x, y)

    def has_room(self, key: str) -> bool:
        """Whether `acquire` would find a slot: the adapter's own, an empty one, or one that nobody uses."""
        return key in self.slots or len(self.slots) < self.max_slots or len(self.users) < len(self.slots)

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
        self.slots[key], self.ranks[key] = slot, adapter.rank
        self._lower_rank()
        self.users[key] += 1
        return slot

    def release(self, key: str) -> None:
        """One user less. The adapter stays in its slot until another one needs it."""
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def tokens(self, runs: Iterable[tuple[int | None, int]]) -> Iterator[Sequence[Piece]]:
        """Let the forward pass inside run its tokens with adapters: (slot, how many tokens) in turn; None is bare."""
        key = tuple(runs)
        if key not in self._plans:
            if len(self._plans) == PLANS_KEPT:
                self._plans.clear()
            self._plans[key] = self._plan(key)
        self.plans.current = self._plans[key]
        try:
            yield self.plans.current
        finally:
            self.plans.current = ()

    @contextmanager
    def masked(self, own: Tensor, slots: int) -> Iterator[Sequence[Piece]]:
        """As `tokens`, one token each, with slots (T,) that the device alone knows, -1 for bare, all below `slots`."""
        foreign = (torch.arange(slots, device=own.device)[None, :] != own[:, None])[:, :, None]
        self.plans.current = [Piece(slice(0, len(own)), 0, slots, foreign=foreign)] if slots else []
        try:
            yield self.plans.current
        finally:
            self.plans.current = ()

    def order(self, slots: Sequence[int | None]) -> Order | None:
        """How to order one token of each row so that none is moved for its adapter's sake; None: as they are."""
        if list(slots) != self._ordered_for:
            self._ordered_for, self._order = list(slots), self._find_order(slots)
        return self._order

    def _find_order(self, slots: Sequence[int | None]) -> Order | None:
        order = sorted(range(len(slots)), key=lambda row: (slots[row] is None, slots[row] or 0))
        if not self.grouped or order == list(range(len(slots))):
            return None
        if any(piece.groups and piece.groups.moves for piece in self._plan(tuple((slots[row], 1) for row in order))):
            return None
        back = sorted(range(len(order)), key=order.__getitem__)
        return Order(order, torch.tensor(order, device=self.device), torch.tensor(back, device=self.device))

    def _plan(self, runs: Runs) -> list[Piece]:
        """Long runs of one adapter are pieces of their own; short neighbours share one."""
        pieces, short, token = [], [], 0
        for slot, group in groupby(runs, key=lambda run: run[0]):
            count = sum(tokens for _, tokens in group)
            if count < LONG:
                short += [slot] * count
            else:
                pieces += [self._short(token - len(short), short)] if short else []
                pieces += [] if slot is None else [Piece(slice(token, token + count), slot, slot + 1)]
                short = []
            token += count
        pieces += [self._short(token - len(short), short)] if short else []
        return [piece for piece in pieces if piece is not None]

    def _short(self, first: int, slots: Sequence[int | None]) -> Piece | None:
        """One piece for tokens of any slots; bare ones at its ends are left out."""
        used = {slot for slot in slots if slot is not None}
        if not used:
            return None
        while slots[-1] is None:
            slots = slots[:-1]
        while slots[0] is None:
            first, slots = first + 1, slots[1:]
        tokens, start, stop = slice(first, first + len(slots)), min(used), max(used) + 1
        if len(set(slots)) == 1:
            return Piece(tokens, start, stop)
        if self.grouped:
            return Piece(tokens, start, stop, groups=self._groups(slots, sorted(used)))
        own = torch.tensor([-1 if slot is None else slot for slot in slots], device=self.device)
        foreign = torch.arange(start, stop, device=self.device)[None, :] != own[:, None]
        return Piece(tokens, start, stop, foreign=foreign[:, :, None])

    def _groups(self, slots: Sequence[int | None], used: Sequence[int]) -> Groups:
        """`used` in order; slots that lie close together are a view, with empty groups for those between."""
        span = range(used[0], used[-1] + 1)
        dense = len(span) <= 2 * len(used)
        number = {slot: i for i, slot in enumerate(span if dense else used)}
        sizes = Counter(slots)
        longest = max(size for slot, size in sizes.items() if slot is not None)
        chosen = slice(span.start, span.stop) if dense else torch.tensor(used, device=self.device)
        if list(slots) == [slot for slot in number for _ in range(longest)]:
            return Groups(chosen)
        gather, place, filled = [0] * (len(number) * longest), [0] * len(slots), Counter[int]()
        for token, slot in enumerate(slots):
            if slot is not None:
                place[token] = number[slot] * longest + filled[slot]
                gather[place[token]] = token
                filled[slot] += 1
        bare = torch.tensor([slot is None for slot in slots], device=self.device)[:, None] if None in slots else None
        moves = Moves(torch.tensor(gather, device=self.device), torch.tensor(place, device=self.device), bare)
        return Groups(chosen, moves)

    def _free_slot(self) -> int:
        taken = set(self.slots.values())
        free = next((slot for slot in range(self.slot_count) if slot not in taken), None)
        if free is not None:
            return free
        idle = next((key for key in self.slots if key not in self.users), None)
        count = self.slot_count
        if count < self.max_slots:
            try:
                self._resize(min(max(1, 2 * count), self.max_slots), self.rank)
                return count
            except Exception as error:
                if not is_shortage(error):
                    raise
            if idle is None:
                self._resize(count + 1, self.rank)
                return count
        assert idle is not None
        return self._empty(idle)

    def _empty(self, key: str) -> int:
        slot = self.slots.pop(key)
        del self.ranks[key]
        self._zero(slot)
        return slot

    def _lower_rank(self) -> None:
        """Nothing is padded for an adapter that is gone, nor for one that has lain idle while all others were used."""
        oldest = next(iter(self.slots))
        idle = oldest not in self.users and len(self.slots) > 1
        needed = max(rank for key, rank in self.ranks.items() if not (idle and key == oldest))
        if needed * MOST_PADDED > self.rank:
            return
        if self.ranks[oldest] > needed:
            self._empty(oldest)
        self.rank = needed  # of each stack at least: memory may end half-way
        try:
            self._resize(self.slot_count, needed)
        except Exception as error:
            if not is_shortage(error):
                raise

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
            size, device, dtype = linears[0].in_features, self.device, self.dtype
            stack = Stack(size, outs, self.plans, device=device, dtype=dtype, joined=self.grouped)
            stack.resize(self.slot_count, self.rank)
            if not self.merged:
                self.hooks.append(linears[0].register_forward_hook(stack))
            self.stacks[group[0]] = stack
            self.version += 1
        return stack

    def _zero(self, slot: int) -> None:
        for stack in self.stacks.values():
            stack.zero(slot)

    def _resize(self, slots: int, rank: int) -> None:
        self.version += 1  # first: memory may end half-way, and then some tensors are others already
        for stack in self.stacks.values():
            stack.resize(slots, rank)
        self.slot_count, self.rank = slots, rank


def linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Linear | Int8Linear | Part]]:
    """The modules that an adapter may change, by name: linear ones that see (B, T, in)."""
    text = module.config.get_text_config()  # type: ignore[union-attr, operator]  # a transformers model
    experts = any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    for name, child in module.named_modules():
        if name.endswith(".kv_b_proj"):
            continue  # it expands latents out of the cache, so it sees a row's whole past at each step
        # Inside a mixture of experts tokens are regrouped, so a row is no longer the first dimension.
        if isinstance(child, nn.Linear | Int8Linear | Part) and (not experts or "attn" in name or "attention" in name):
            yield name, child


def shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that an adapter may change."""
    return {name: (child.out_features, child.in_features) for name, child in linear_modules(module)}


def head_name(module: nn.Module) -> str:
    """The module that makes the logits."""
    head = module.get_output_embeddings()  # type: ignore[operator]  # a transformers model
    return next((name for name, child in module.named_modules() if child is head), "")
