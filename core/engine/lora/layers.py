"""LoRA for any mix of adapters in one batch: y = W x + B (A x), each token with its own.

A (S*R, in) and B (S*R, out) stack the adapters in use, one slot each, with the scale folded into B and lower ranks
padded with zeros. Two ways compute the same result. Compiled operators take tiles, a few tokens of one slot that share
a read of its weights (as in Punica, arXiv 2310.18547). torch multiplies the slice of one adapter, or all slots for all
rows with a mask: more arithmetic, but one shape whatever the mix. Base-model rows compute nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core.engine.cpu.compiled import tiles_of
from core.engine.lora.segments import LoraSegment, SegmentPlanner


class StackedLora:
    """A and B of the linear modules that share an input, so that one product covers all of them.

    a is (S, P * R, in), module by module within a slot. b holds one (S, R, out) per module or, `joined` as the compiled
    operators need it, a single (S, P * R, sum of outs), zero outside the modules' own blocks.
    """

    def __init__(
        self,
        in_features: int,
        outs: Sequence[int],
        planner: SegmentPlanner,
        *,
        device: torch.device,
        dtype: torch.dtype,
        joined: bool,
    ) -> None:
        self.planner = planner
        self.outs, self.joined = tuple(outs), joined
        self.widths = (sum(outs),) if joined else self.outs  # of the tensors in b
        self.rank = 0
        self.a = torch.zeros(0, 0, in_features, device=device, dtype=dtype)
        self.b = [torch.zeros(0, 0, width, device=device, dtype=dtype) for width in self.widths]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook of a single module."""
        self.add(inputs[0], output)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add to y (..., sum of outs), in place, the planned adapters' products of x (..., in); tokens in any shape."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for segment in self.planner.current:
            if segment.tiles is not None:
                self._add_tiles(segment, segment.tiles, x, y)
                continue
            ys = y[segment.tokens].split_with_sizes(self.widths, dim=1)
            self._add_masked(segment, x[segment.tokens], ys)

    def _add_tiles(self, segment: LoraSegment, tiles: Tensor, x: Tensor, y: Tensor) -> None:
        assert self.planner.operators is not None
        if len(x) != segment.tokens.stop:  # the model's own head gets only the last token of a single row
            assert segment.stop == segment.start + 1
            tiles = tiles_of([segment.start] * len(x))
        self.planner.operators.add_lora(x, y, self.a, self.b[0], tiles, self.outs)

    def _add_masked(self, segment: LoraSegment, x: Tensor, ys: Sequence[Tensor]) -> None:
        slots = slice(segment.start, segment.stop)
        h = nn.functional.linear(x, self.a[slots].flatten(0, 1)).view(len(x), segment.stop - segment.start, -1)
        if segment.foreign is not None:
            # Filled, not multiplied: another row's overflow times zero would be NaN.
            h.masked_fill_(segment.foreign, 0.0)
        for y, b, own in zip(ys, self.b, h.chunk(len(ys), dim=2), strict=True):
            y.addmm_(own.flatten(1), b[slots].flatten(0, 1))

    def resize(self, slots: int, rank: int) -> None:
        """Change the number of slots or the rank; what fits stays. On an out-of-memory error nothing changes."""
        if (slots, rank) == (len(self.a), self.rank):
            return  # done before another stack ran out of memory
        a = _resized(self.a, len(self.outs), slots, rank)
        b = [_resized(old, len(self.outs) if self.joined else 1, slots, rank) for old in self.b]
        self.a, self.b, self.rank = a, b, rank

    def fill(self, slot: int, part: int, a: Tensor, b: Tensor) -> None:
        """Write one module's A (r, in) and B (out, r) to a slot that is zero."""
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
    """(S, P * R, n) with another number of slots and another rank."""
    old = old.view(len(old), parts, old.shape[1] // parts, old.shape[2])
    kept = old[:slots, :, :rank]
    new = old.new_zeros(slots, parts, rank, old.shape[3])
    new[: len(kept), :, : kept.shape[2]] = kept
    return new.flatten(1, 2)
