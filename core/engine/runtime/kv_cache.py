"""Key/value cache: one slot per running row, rows compact, positions per row.

Memory outside the used part of the running rows is always zero: a row is wiped when it is released, so nothing of a
finished conversation remains. Where untouched memory is free (core.engine.cpu.lazy_zeros) all slots are allocated once
for the longest context; elsewhere they grow with the load.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from core.engine.cpu.lazy_zeros import lazy_zeros
from core.engine.out_of_memory import is_out_of_memory

LENGTH_STEP = 16  # read lengths are multiples of it
FIRST_LENGTH = 256  # capacities are multiples of it
IDLE_BYTES = 64 * 2**20  # kept without rows, so that the next turn finds its pages


@dataclass(frozen=True, slots=True)
class SlotSegment:
    """Part of a pass: the same number of tokens of some consecutive rows, each from its own position on."""

    tokens: slice  # of the pass, row by row
    first: int
    rows: int
    length: int  # keys read: positions [0, length)
    positions: Tensor  # (rows, T)
    start: int | None  # first row's first position; None if only the device knows it
    row_index: Tensor  # (rows, 1)
    mask: Tensor  # bool (rows, 1, T, length), causal
    biases: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # cache of `bias`

    def bias(self, window: int | None, keys: int, group: int, dtype: torch.dtype) -> Tensor:
        """The additive mask for scores of `group` heads packed as queries of one key: (rows, keys, group * T, length).

        With a window each token sees only that many last tokens of its row, itself included.
        """
        window = self.length if window is None else min(window, self.length)
        found = self.biases.get((window, keys, group))
        if found is None:
            mask = self.mask
            if window < self.length:
                mask = mask & (
                    torch.arange(self.length, device=mask.device) > self.positions[:, None, :, None] - window
                )
            added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            found = self.biases[window, keys, group] = added.repeat(1, keys, group, 1)
        return found


class _ActiveSegment(threading.local):
    """The segment that this thread's own forward pass of the model works on."""

    segment: SlotSegment | None = None


active = _ActiveSegment()


@contextmanager
def segment_scope(segment: SlotSegment) -> Iterator[None]:
    """Let the model's own forward pass inside read and write that segment."""
    active.segment = segment
    try:
        yield
    finally:
        active.segment = None


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer: (slots, kv_heads, length, head_dim)."""

    is_sliding = False

    def __init__(self, *, lazy: bool = False) -> None:
        super().__init__()
        self.lazy = lazy
        self.capacity = (0, 0)  # slots, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._blank(key_states), self._blank(value_states)
        self.is_initialized = True

    def _blank(self, like: Tensor) -> Tensor:
        """like is (rows, kv_heads, T, head_dim)."""
        slots, length = self.capacity
        shape = (slots, like.shape[1], length, like.shape[3])
        return lazy_zeros(shape, like.dtype) if self.lazy else like.new_zeros(shape)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`put` at the active segment."""
        assert active.segment is not None
        return self.put(active.segment, key_states, value_states)

    def whole(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, allocated if needed; like is (rows, kv_heads, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(like[:, :, None], like[:, :, None])
        return self.keys, self.values

    def put(self, segment: SlotSegment, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write (rows, kv_heads, T, head_dim) to a segment; return views (rows, kv_heads, length, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, rows = segment.first, slice(segment.first, segment.first + segment.rows)
        if segment.rows == 1 and segment.start is not None:  # a plain copy is faster than an indexed one
            stop = segment.start + key_states.shape[2]
            self.keys[first, :, segment.start : stop] = key_states[0]
            self.values[first, :, segment.start : stop] = value_states[0]
        else:  # indices around a slice put their shape first: (rows, T, kv_heads, head_dim)
            self.keys[segment.row_index, :, segment.positions] = key_states.transpose(1, 2)
            self.values[segment.row_index, :, segment.positions] = value_states.transpose(1, 2)
        return self.keys[rows, :, : segment.length], self.values[rows, :, : segment.length]

    def resize(self, slots: int, length: int, *, used: Sequence[int], reach: Sequence[int]) -> None:
        """Change the capacity, keeping the `used` positions of each row. `reach` is how far each row may have been
        written.
        """
        self.capacity = (slots, length)
        if self.is_initialized:
            self.keys = _resized(self.keys, slots, length, used, reach)
            self.values = _resized(self.values, slots, length, used, reach)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        assert active.segment is not None
        return active.segment.length

    def get_max_length(self) -> int:
        return self.capacity[1]


class SlotCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """KV slots of all layers. Rows [0, rows) are running; `used[row]` tokens of each are filled.

    A `spare` slot, of index `slots`, takes the writes of static steps for padding rows. `lazy` allocates all slots at
    once in memory that costs nothing before it is written: CPU only, without a spare.
    """

    def __init__(
        self,
        layers: int,
        *,
        max_rows: int,
        max_length: int,
        spare: bool = False,
        lazy: bool = False,
    ) -> None:
        assert not (spare and lazy)
        super().__init__(layers=[SlotLayer(lazy=lazy) for _ in range(layers)])
        self.max_rows, self.max_length = max_rows, max_length
        self.spare, self.lazy = spare, lazy
        self.slots, self.length = 0, 0  # capacity
        self.version = 0  # changes when tensors are reallocated
        self.used: list[int] = []
        self.reach: list[int] = []  # positions of each row that may have been written
        self.dirty: dict[int, int] = {}  # row -> largest length wiped there
        self._position_bytes = 0

    @property
    def rows(self) -> int:
        return len(self.used)

    @property
    def capacity(self) -> tuple[int, int]:
        """Number of slots, and their length."""
        return self.slots, self.length

    def add_row(self, length: int = 0) -> int:
        """Append an empty row with capacity for that length. May raise as `reserve`."""
        assert self.rows < self.max_rows
        self._ensure_capacity(self.rows + 1, max(length, 1))
        self.used.append(0)
        self.reach.append(0)
        return self.rows - 1

    def reserve(self, length: int) -> None:
        """Grow to rows of that length. May raise an out-of-memory error, which leaves the rows as they are."""
        self._ensure_capacity(self.rows, length)

    def _ensure_capacity(self, slots: int, length: int) -> None:
        """Grow both at once, since each reallocation copies all rows, and double them if memory permits."""
        assert slots <= self.max_rows
        assert length <= self.max_length
        if slots <= self.slots and length <= self.length:
            return
        length = min(-(-length // FIRST_LENGTH) * FIRST_LENGTH, self.max_length)
        needed = max(slots, self.slots), max(length, self.length)
        wished = _grown(slots, self.slots, self.max_rows), _grown(length, self.length, self.max_length)
        if self.lazy:
            wished = self.max_rows, self.max_length
        try:
            self._resize(*wished)
            return
        except Exception as error:
            if wished == needed or not is_out_of_memory(error):
                raise
        self._resize(*needed)  # here, where the error no longer references tensors

    def enter(self, first: int, counts: Sequence[int]) -> list[int]:
        """Reserve the next counts[i] tokens of row first + i; returns how many tokens each row holds."""
        used = self.used[first : first + len(counts)]
        self.reserve(max(map(sum, zip(used, counts, strict=True))))
        for row, (start, count) in enumerate(zip(used, counts, strict=True), first):
            self.reach[row] = start + count
        return used

    def begin(self, first: int, counts: Sequence[int], device: torch.device) -> list[SlotSegment]:
        """Segments that a pass over the next counts[i] tokens of row first + i reads and writes.

        Neighbours with one token each share a segment, as in decoding; every other row is a segment of its own.
        """
        self.enter(first, counts)
        segments, row, token = [], first, 0
        for count, same in groupby(counts):
            together = sum(1 for _ in same)
            for rows in [together] if count == 1 else [1] * together:
                segments.append(self._segment(slice(token, token + rows * count), row, rows, count, device))
                row, token = row + rows, token + rows * count
        return segments

    def _segment(self, tokens: slice, first: int, rows: int, count: int, device: torch.device) -> SlotSegment:
        used = self.used[first : first + rows]
        length = min(-(-(max(used) + count) // LENGTH_STEP) * LENGTH_STEP, self.length)
        positions = torch.tensor(used, device=device)[:, None] + torch.arange(count, device=device)
        row_index = torch.arange(first, first + rows, device=device)[:, None]
        mask = torch.arange(length, device=device) <= positions[:, None, :, None]
        return SlotSegment(tokens, first, rows, length, positions, used[0], row_index, mask)

    def static(self, positions: Tensor, row_index: Tensor, length: int) -> SlotSegment:
        """A segment of one token of each of the first rows, at positions (rows,) known to the device only."""
        mask = torch.arange(length, device=positions.device) <= positions[:, None, None, None]
        rows = len(positions)
        return SlotSegment(slice(0, rows), 0, rows, length, positions[:, None], None, row_index[:, None], mask)

    def touch(self, rows: int) -> None:
        """Each of the first rows may have been written by one more token."""
        for row in range(rows):
            self.reach[row] = self.used[row] + 1

    def advance(self, first: int, counts: Sequence[int]) -> None:
        """Count the tokens of a finished pass."""
        for row, count in enumerate(counts, first):
            self.used[row] += count

    @property
    def used_bytes(self) -> int:
        """Bytes of keys and values in the used part of all rows."""
        return self._bytes_of(sum(self.used))

    @property
    def held_bytes(self) -> int:
        """Bytes held while no row runs."""
        return self._bytes_of(sum(self.dirty.values()) if self.lazy else self.slots * self.length)

    def _bytes_of(self, positions: int) -> int:
        if not self._position_bytes:
            self._position_bytes = sum(tensor[0, :, :1].nbytes for tensor in self._tensors())
        return self._position_bytes * positions

    def row_bytes(self, row: int) -> int:
        """Bytes that `take_out` would copy."""
        return sum(tensor[row, :, : self.used[row]].nbytes for tensor in self._tensors())

    def take_out(self, row: int) -> list[Tensor]:
        """A copy of the row's used part: (kv_heads, used, head_dim), keys and values of each layer in turn."""
        return [tensor[row, :, : self.used[row]].clone() for tensor in self._tensors()]

    def put_in(self, row: int, tensors: list[Tensor], count: int) -> None:
        """Start an empty row with the first `count` positions of tensors from `take_out`."""
        assert self.used[row] == 0
        self.reserve(count)
        self.reach[row] = count
        for layer, keys, values in zip(self.layers, tensors[::2], tensors[1::2], strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
        for tensor, kept in zip(self._tensors(), tensors, strict=True):
            tensor[row, :, :count] = kept[:, :count]
        self.used[row] = count

    def move(self, source: int, target: int) -> None:
        """Copy a row over a wiped one, and wipe the source."""
        assert self.used[target] == 0
        length = self.used[source]
        for tensor in self._tensors():
            tensor[target, :, :length] = tensor[source, :, :length]
        self.used[target] = self.reach[target] = length
        self.wipe(source)

    def wipe(self, row: int) -> None:
        """Zero a row, including writes of a failed pass beyond its used part."""
        for tensor in self._tensors():
            tensor[row, :, : self.reach[row]] = 0
        self.dirty[row] = max(self.dirty.get(row, 0), self.reach[row])
        self.used[row] = self.reach[row] = 0

    def drop_last(self) -> None:
        """Remove the last row, wiped before. Without rows, memory beyond IDLE_BYTES is freed, except with a spare:
        graphs are captured over these tensors.
        """
        assert self.used[-1] == 0
        self.used.pop()
        self.reach.pop()
        if not self.used and not self.spare and self.held_bytes > IDLE_BYTES:
            self.clear()

    def clear(self) -> None:
        """Free all memory."""
        self.used, self.reach = [], []
        self.slots, self.length = 0, 0
        self.dirty.clear()
        self.version += 1
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
            layer.capacity = (0, 0)

    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]

    def _resize(self, slots: int, length: int) -> None:
        self.version += 1  # first: an out-of-memory error may leave some tensors reallocated
        for layer in self.layers:
            layer.resize(slots + self.spare, length, used=self.used, reach=self.reach)
        self.slots, self.length = slots, length


def _grown(needed: int, held: int, most: int) -> int:
    return held if needed <= held else min(max(needed, 2 * held), most)


def _resized(old: Tensor, slots: int, length: int, used: Sequence[int], reach: Sequence[int]) -> Tensor:
    """Copy row by row, so that one long row does not cost all."""
    new = old.new_zeros((slots, old.shape[1], length, old.shape[3]))
    for row, (kept, written) in enumerate(zip(used, reach, strict=True)):
        new[row, :, :kept] = old[row, :, :kept]
        old[row, :, :written] = 0  # freed memory may stay in the allocator's pool
    return new
