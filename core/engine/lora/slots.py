"""Adapter slots: which adapter is in which slot and who uses it, and which modules adapters may change.

core.engine.lora.layers multiplies what the slots hold.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core.engine.cpu.compiled import compiled
from core.engine.cpu.int8 import Int8Linear, LinearSlice
from core.engine.lora.adapter_files import AdapterWeights
from core.engine.lora.layers import StackedLora
from core.engine.lora.segments import SegmentPlanner
from core.engine.out_of_memory import is_out_of_memory

MAX_PADDING = 4  # ratio of the stacked rank to the needed one from which all slots are reallocated


class AdapterSlots:
    """Slots of adapters and their users. All methods belong to the model thread."""

    def __init__(
        self,
        module: nn.Module,
        *,
        max_slots: int,
        device: torch.device,
        dtype: torch.dtype,
        groups: Sequence[tuple[str, ...]] = (),
    ) -> None:
        """`groups` lists modules whose products are merged, in order; their LoRA is applied by `add`."""
        self.linears = dict(linear_modules(module))
        self.max_slots, self.device, self.dtype = max_slots, device, dtype
        self.planner = SegmentPlanner(device, compiled() if device.type == "cpu" and dtype is torch.float32 else None)
        self.merged = bool(groups)
        self.places = {name: (group, part) for group in groups for part, name in enumerate(group)}
        self.stacks: dict[str, StackedLora] = {}  # by first module of the group
        self.hooks: list[RemovableHandle] = []  # on models that run their own forward pass
        self.slots: dict[str, int] = {}  # adapter sha256 -> slot, least recently used first
        self.ranks: dict[str, int] = {}  # of the adapters in slots
        self.users: Counter[str] = Counter()
        self.slot_count, self.rank = 0, 0
        self.version = 0  # changes when tensors are reallocated

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Add to y, in place, the pass's LoRA for x in the group that begins with `name`."""
        stack = self.stacks.get(name)
        if stack is not None:
            stack.add(x, y)

    def has_slot(self, key: str) -> bool:
        """Whether `acquire` would find a slot: the adapter's own, an empty one, or an unused one."""
        return key in self.slots or len(self.slots) < self.max_slots or len(self.users) < len(self.slots)

    def acquire(self, adapter: AdapterWeights) -> int:
        """The adapter's slot, filled if need be and held until `release`. At most max_slots different ones at once."""
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
        """Release one use. The adapter stays in its slot until another one needs it."""
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self.hooks:
            hook.remove()

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
                if not is_out_of_memory(error):
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
        """Stop padding for an adapter that is gone, or idle while all others were used."""
        oldest = next(iter(self.slots))
        idle = oldest not in self.users and len(self.slots) > 1
        needed = max(rank for key, rank in self.ranks.items() if not (idle and key == oldest))
        if needed * MAX_PADDING > self.rank:
            return
        if self.ranks[oldest] > needed:
            self._empty(oldest)
        self.rank = needed  # first: an out-of-memory error may leave stacks of a higher rank
        try:
            self._resize(self.slot_count, needed)
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    def _fill(self, slot: int, adapter: AdapterWeights) -> None:
        if adapter.rank > self.rank:
            self._resize(self.slot_count, adapter.rank)
        for name, (a, b) in adapter.pairs.items():
            group, part = self.places.get(name, ((name,), 0))
            self._stack(group).fill(slot, part, a, b)

    def _stack(self, group: tuple[str, ...]) -> StackedLora:
        stack = self.stacks.get(group[0])
        if stack is None:
            linears = [self.linears[name] for name in group]
            outs = [linear.out_features for linear in linears]
            size, device, dtype = linears[0].in_features, self.device, self.dtype
            stack = StackedLora(
                size, outs, self.planner, device=device, dtype=dtype, joined=self.planner.operators is not None
            )
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
        self.version += 1  # first: an out-of-memory error may leave some tensors reallocated
        for stack in self.stacks.values():
            stack.resize(slots, rank)
        self.slot_count, self.rank = slots, rank


def linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Linear | Int8Linear | LinearSlice]]:
    """Modules that adapters may change, by name: linear ones with inputs (B, T, in)."""
    text = module.config.get_text_config()  # type: ignore[union-attr, operator]  # a transformers model
    experts = any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    for name, child in module.named_modules():
        if name.endswith(".kv_b_proj"):
            continue  # it expands cached latents, so each step runs it over the whole row
        # A mixture of experts regroups tokens, so that rows are no longer the first dimension.
        if isinstance(child, nn.Linear | Int8Linear | LinearSlice) and (
            not experts or "attn" in name or "attention" in name
        ):
            yield name, child


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every module that adapters may change."""
    return {name: (child.out_features, child.in_features) for name, child in linear_modules(module)}


def head_name(module: nn.Module) -> str:
    """Name of the module that computes the logits."""
    head = module.get_output_embeddings()  # type: ignore[operator]  # a transformers model
    return next((name for name, child in module.named_modules() if child is head), "")
