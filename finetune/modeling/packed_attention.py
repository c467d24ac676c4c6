"""Attention of rows packed into one: each row over the shared prefix and itself. Knows no data and no families.

A dense mask makes torch compute every pair of tokens and throw most of them away. Here a row's scores are its own:
rows of like length, and heads that share a key, go in one product, and the probabilities are kept for the backward
pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "distributary-packed"
ALIKE = 0.8  # of the longest row's tokens: from there on a product of their own costs more than what fills a row up
SCORES_KEPT = 2**22  # numbers a layer keeps at most (16 MiB); longer rows go by the mask, whose kernel keeps none


class PackedRows:
    """Rows of like length, one after another, that see `seen` tokens of the prefix and themselves."""

    def __init__(self, seen: int, start: int, own: Sequence[int]) -> None:
        self.seen, self.own, self.longest = seen, tuple(own), max(own)
        starts = [start + sum(own[:row]) for row in range(len(own))]
        self.places = [slice(first, first + count) for first, count in zip(starts, own, strict=True)]
        later = torch.full((self.longest, self.longest), -torch.inf).triu_(1)
        self.later = torch.cat((later.new_zeros(self.longest, seen), later), dim=1)  # (L, seen + L)

    def lay(self, given: Tensor) -> Tensor:
        """(heads, T, D) -> (R, heads, L, D) of the rows' own tokens, zero behind shorter ones."""
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
        """The way back of `lay`: (R, heads, L, D) into (heads, T, D)."""
        for row, place in enumerate(self.places):
            to[:, place] = laid[row, :, : self.own[row]]

    def take_seen(self, laid: Tensor, to: Tensor) -> None:
        """The way back of `lay_seen`, for gradients: what all rows give to the prefix is added up."""
        to[:, : self.seen] += laid[:, :, : self.seen].sum(0)
        self.take(laid[:, :, self.seen :], to)


class Layout:
    """How rows lie in a packed one: the prefix, then each row's own tokens."""

    def __init__(self, prefix: int, own: Sequence[int]) -> None:
        self.pieces = [PackedRows(0, 0, [prefix])]  # first: in `take_seen` the others add to what it has put there
        start = prefix
        for some in _alike(own):
            self.pieces.append(PackedRows(prefix, start, some))
            start += sum(some)

    def scores(self) -> int:
        """How many pairs of tokens one head looks at."""
        return sum(len(one.own) * one.longest * (one.seen + one.longest) for one in self.pieces)


def _alike(own: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours of like length."""
    some: list[int] = []
    for count in own:
        if some and min(*some, count) < ALIKE * max(*some, count):
            yield some
            some = []
        some.append(count)
    yield some


_layouts = WeakTensorKeyDictionary()  # by mask, since a layer is handed nothing else of its batch, also when recomputed


def describe(mask: Tensor, layout: Layout) -> None:
    """From now on this very mask means that layout."""
    _layouts[mask] = layout


def use(model: Any) -> None:
    """Let a model attend so where it is given such a mask; all else stays torch's. Models not led to torch's own

    kernel (capped scores, sinks) stay as they are.
    """
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, kv_heads, T, D) -> (1, T, H, D)."""
    layout: Layout | None = None
    if attention_mask is not None:
        layout = _layouts.get(attention_mask)  # type: ignore[no-untyped-call]  # torch types no such dictionary
    special = ("sliding_window", "softcap", "s_aux", "position_bias")
    if (
        layout is None
        or query.device.type != "cpu"
        or query.dtype != torch.float32
        or options.get("dropout")
        or any(options.get(name) is not None for name in special)
        or layout.scores() * query.shape[1] > SCORES_KEPT
    ):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows: Tensor = _Packed.apply(  # type: ignore[no-untyped-call]  # torch types no apply
        query[0], key[0], value[0], layout, scale
    )
    return rows[None], None


class _Packed(torch.autograd.Function):
    """query (H, T, D), key and value (kv_heads, T, D) -> (T, H, D)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        heads, count, _ = query.shape
        kv = len(key)
        out = query.new_empty(count, heads, value.shape[-1])
        kept: list[Tensor] = []
        for piece in layout.pieces:
            q = _by_key(piece.lay(query), kv).mul_(scale)  # (R * kv, group * L, D)
            k, v = piece.lay_seen(key).flatten(0, 1), piece.lay_seen(value).flatten(0, 1)  # (R * kv, seen + L, D)
            p = torch.softmax(torch.baddbmm(piece.later.repeat(heads // kv, 1), q, k.mT), dim=-1)
            piece.take(_by_head(p @ v, heads, piece), out.transpose(0, 1))
            kept += (q, k, v, p)
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.shapes = layout, scale, (query.shape, key.shape, value.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        of_out = grads[0].transpose(0, 1)  # (H, T, D)
        of_query, of_key, of_value = (of_out.new_zeros(shape) for shape in ctx.shapes)
        heads, kv = len(of_query), len(of_key)
        for number, piece in enumerate(ctx.layout.pieces):
            q, k, v, p = kept[4 * number : 4 * number + 4]
            g = _by_key(piece.lay(of_out), kv)
            of_scores = torch.ops.aten._softmax_backward_data(g @ v.mT, p, -1, p.dtype)
            piece.take(_by_head((of_scores @ k).mul_(ctx.scale), heads, piece), of_query)
            piece.take_seen((of_scores.mT @ q).unflatten(0, (-1, kv)), of_key)
            piece.take_seen((p.mT @ g).unflatten(0, (-1, kv)), of_value)
        return of_query, of_key, of_value, None, None


def _by_key(laid: Tensor, kv: int) -> Tensor:
    """Heads that share a key as further tokens: (R, H, L, D) -> (R * kv, group * L, D)."""
    return laid.view(len(laid) * kv, -1, laid.shape[-1])


def _by_head(given: Tensor, heads: int, piece: PackedRows) -> Tensor:
    """The way back: (R * kv, group * L, D) -> (R, H, L, D)."""
    return given.view(len(piece.own), heads, piece.longest, -1)


AttentionInterface.register(NAME, attend_packed)
AttentionMaskInterface.register(NAME, sdpa_mask)
