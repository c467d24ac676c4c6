"""Layout of rows packed into one sequence behind a shared prefix; copies tensors between packed and per-row form."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ALIKE = 0.8  # rows at least this fraction as long as the longest share a batched product


class PackedRows:
    """Consecutive rows of similar length, each attending to `seen` prefix tokens and itself."""

    def __init__(self, seen: int, start: int, own: Sequence[int]) -> None:
        self.seen, self.own, self.longest = seen, tuple(own), max(own)
        starts = [start + sum(own[:row]) for row in range(len(own))]
        self.places = [slice(first, first + count) for first, count in zip(starts, own, strict=True)]
        later = torch.full((self.longest, self.longest), -torch.inf).triu_(1)
        self.later = torch.cat((later.new_zeros(self.longest, seen), later), dim=1)  # (L, seen + L)

    def lay(self, given: Tensor) -> Tensor:
        """(heads, T, D) -> (R, heads, L, D) of the rows' own tokens, zero-padded."""
        laid = given.new_zeros(len(self.own), len(given), self.longest, given.shape[-1])
        self._put(laid, given)
        return laid

    def lay_seen(self, given: Tensor) -> Tensor:
        """(heads, T, D) -> (R, heads, seen + L, D): the prefix before each row."""
        laid = given.new_zeros(len(self.own), len(given), self.seen + self.longest, given.shape[-1])
        laid[:, :, : self.seen] = given[:, : self.seen]
        self._put(laid[:, :, self.seen :], given)
        return laid

    def _put(self, laid: Tensor, given: Tensor) -> None:
        for row, place in enumerate(self.places):
            laid[row, :, : self.own[row]] = given[:, place]

    def take(self, laid: Tensor, to: Tensor) -> None:
        """Inverse of `lay`: (R, heads, L, D) into (heads, T, D)."""
        for row, place in enumerate(self.places):
            to[:, place] = laid[row, :, : self.own[row]]

    def take_seen(self, laid: Tensor, to: Tensor) -> None:
        """Adjoint of `lay_seen`, for gradients: prefix gradients are summed over rows."""
        to[:, : self.seen] += laid[:, :, : self.seen].sum(0)
        self.take(laid[:, :, self.seen :], to)


class Layout:
    """Packed sequence: the prefix, then each row's own tokens."""

    def __init__(self, prefix: int, own: Sequence[int]) -> None:
        self.pieces = [PackedRows(0, 0, [prefix])]  # first: `take_seen` of the others adds to it
        start = prefix
        for some in _alike(own):
            self.pieces.append(PackedRows(prefix, start, some))
            start += sum(some)

    def scores(self) -> int:
        """Attention scores per head."""
        return sum(len(one.own) * one.longest * (one.seen + one.longest) for one in self.pieces)


def _alike(own: Sequence[int]) -> Iterator[list[int]]:
    """Groups of consecutive rows of similar length."""
    some: list[int] = []
    for count in own:
        if some and min(*some, count) < ALIKE * max(*some, count):
            yield some
            some = []
        some.append(count)
    yield some


_layouts = WeakTensorKeyDictionary()  # mask -> Layout: an attention layer gets nothing else of its batch


def describe(mask: Tensor, layout: Layout) -> None:
    """Attach a layout to the mask tensor that stands for it."""
    _layouts[mask] = layout


def layout_of(mask: Tensor | None) -> Layout | None:
    layout: Layout | None = None
    if mask is not None:
        layout = _layouts.get(mask)  # type: ignore[no-untyped-call]  # untyped in torch
    return layout
