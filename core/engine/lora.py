"""LoRA for any mix of adapters in one batch: y = W x + B_cat (mask * (A_cat x)). Knows no requests and no text.

A_cat (S*R, in) and B_cat (out, S*R) stack the adapters that rows run with, one slot each, scale folded into B, lower
ranks padded with zeros; the mask keeps to each row its own slot. A pass whose rows all run bare computes nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.engine.adapter_files import AdapterWeights


@dataclass(frozen=True, slots=True)
class Plan:
    """Which slots a pass uses: columns [start, stop) of the stack, and which of them are foreign to each row.

    foreign is bool (B, 1, stop - start), or None if all rows run with the one slot that is used.
    """

    start: int
    stop: int
    foreign: Tensor | None


class Stack:
    """A_cat and B_cat of one linear module, applied by a forward hook."""

    def __init__(self, linear: nn.Linear, plans: PlanHolder, *, device: torch.device, dtype: torch.dtype) -> None:
        self.plans = plans
        self.a = torch.zeros(0, linear.in_features, device=device, dtype=dtype)  # (S*R, in)
        self.b = torch.zeros(linear.out_features, 0, device=device, dtype=dtype)  # (out, S*R)
        linear.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        plan = self.plans.current
        if plan is None:
            return None
        (x,) = inputs
        h = nn.functional.linear(x, self.a[plan.start : plan.stop])  # (B, T, columns)
        if plan.foreign is not None:
            # Filled, not multiplied: another tenant's overflow times zero would be NaN.
            h = h.masked_fill(plan.foreign, 0.0)
        return output + nn.functional.linear(h, self.b[:, plan.start : plan.stop])

    def resize(self, slots: int, rank: int, *, old_rank: int) -> None:
        """Another number of slots or rank; what is there stays in its slot."""
        a = self.a.new_zeros(slots, rank, self.a.shape[1])
        b = self.b.new_zeros(self.b.shape[0], slots, rank)
        if old_rank and len(self.a):
            old = self.a.view(-1, old_rank, self.a.shape[1])
            a[: len(old), :old_rank] = old
            b[:, : len(old), :old_rank] = self.b.view(self.b.shape[0], -1, old_rank)
        self.a, self.b = a.flatten(0, 1), b.flatten(1, 2)


class PlanHolder:
    """The plan of the running pass, as the hooks see it."""

    current: Plan | None = None


class LoraStacks:
    """The slots: which adapter lies in which, and who uses it. All methods belong to the model thread."""

    def __init__(self, module: nn.Module, *, max_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.linears = dict(linear_modules(module))
        self.max_slots, self.device, self.dtype = max_slots, device, dtype
        self.plans = PlanHolder()
        self.stacks: dict[str, Stack] = {}
        self.slots: dict[str, int] = {}  # adapter sha256 -> slot, least recently used first
        self.users: Counter[str] = Counter()
        self.slot_count, self.rank = 0, 0

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
    def rows(self, slots: Sequence[int | None]) -> Iterator[None]:
        """Let the forward pass inside run row i with the adapter in slots[i]; None is the bare base model."""
        self.plans.current = self._plan(slots)
        try:
            yield
        finally:
            self.plans.current = None

    def _plan(self, slots: Sequence[int | None]) -> Plan | None:
        used = {slot for slot in slots if slot is not None}
        if not used:
            return None
        low, high = min(used), max(used) + 1
        foreign = None
        if len(set(slots)) > 1:
            own = torch.tensor([-1 if slot is None else slot for slot in slots], device=self.device)
            columns = torch.arange(low, high, device=self.device).repeat_interleave(self.rank)
            foreign = (columns[None, :] != own[:, None])[:, None, :]
        return Plan(low * self.rank, high * self.rank, foreign)

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
            stack = self.stacks.get(name)
            if stack is None:
                stack = Stack(self.linears[name], self.plans, device=self.device, dtype=self.dtype)
                stack.resize(self.slot_count, self.rank, old_rank=0)
                self.stacks[name] = stack
            start = slot * self.rank
            stack.a[start : start + len(a)].copy_(a)
            stack.b[:, start : start + len(a)].copy_(b)

    def _zero(self, slot: int) -> None:
        columns = slice(slot * self.rank, (slot + 1) * self.rank)
        for stack in self.stacks.values():
            stack.a[columns] = 0
            stack.b[:, columns] = 0

    def _resize(self, slots: int, rank: int) -> None:
        for stack in self.stacks.values():
            stack.resize(slots, rank, old_rank=self.rank)
        self.slot_count, self.rank = slots, rank


def linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The modules that an adapter may change, by name: linear ones that see (B, T, in)."""
    text = module.config.get_text_config()  # type: ignore[union-attr, operator]  # a transformers model
    experts = any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    for name, child in module.named_modules():
        # Inside a mixture of experts tokens are regrouped, so a row is no longer the first dimension.
        if isinstance(child, nn.Linear) and (not experts or "attn" in name or "attention" in name):
            yield name, child


def shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that an adapter may change."""
    return {name: (child.out_features, child.in_features) for name, child in linear_modules(module)}
