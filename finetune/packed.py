"""Attention of rows packed into one: each row over the shared prefix and itself. Knows no data and no families.

A dense mask makes torch compute every pair of tokens and throw most of them away. Here a row's scores are products of
its own, heads that share a key go in one product, and the probabilities are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "distributary-packed"
SCORES_KEPT = 2**22  # numbers a layer keeps at most (16 MiB); longer rows go by the mask, whose kernel keeps none


class Layout(NamedTuple):
    """How rows lie in a packed one: the prefix, then each row's own tokens."""

    prefix: int
    own: tuple[int, ...]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(how many tokens of the prefix it sees before itself, start, stop): the prefix itself, then each row."""
        yield 0, 0, self.prefix
        start = self.prefix
        for count in self.own:
            yield self.prefix, start, start + count
            start += count

    def scores(self) -> int:
        """How many pairs of tokens one head looks at."""
        return sum((seen + stop - start) * (stop - start) for seen, start, stop in self.pieces())


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
        longest = max(layout.prefix, *layout.own)
        later = torch.full((longest, longest), -torch.inf).triu_(1)
        kept: list[Tensor] = []
        for seen, start, stop in layout.pieces():
            own = stop - start
            scores = _of(query, start, stop, kv) @ _seen(key, seen, start, stop).mT  # (kv, group * own, seen + own)
            scores.mul_(scale).view(heads, own, seen + own)[:, :, seen:].add_(later[:own, :own])
            p = torch.softmax(scores, dim=-1)
            out[start:stop] = (p @ _seen(value, seen, start, stop)).view(heads, own, -1).transpose(0, 1)
            kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        kv = len(key)
        of_out = grads[0].transpose(0, 1)  # (H, T, D)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for p, (seen, start, stop) in zip(kept, ctx.layout.pieces(), strict=True):
            g = _of(of_out, start, stop, kv)
            of_p = g @ _seen(value, seen, start, stop).mT
            of_scores = of_p.sub_((of_p * p).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
            of_query[:, start:stop] = (of_scores @ _seen(key, seen, start, stop)).view(len(query), stop - start, -1)
            _spread(of_key, of_scores.mT @ _of(query, start, stop, kv), seen, start, stop)
            _spread(of_value, p.mT @ g, seen, start, stop)
        return of_query, of_key, of_value, None, None


def _of(heads: Tensor, start: int, stop: int, kv: int) -> Tensor:
    """Heads that share a key as further tokens: (H, T, D) -> (kv, group * own, D)."""
    return heads[:, start:stop].reshape(kv, len(heads) // kv * (stop - start), -1)


def _seen(given: Tensor, seen: int, start: int, stop: int) -> Tensor:
    """What a piece looks at: the prefix before it, and itself."""
    own = given[:, start:stop]
    return torch.cat((given[:, :seen], own), dim=1) if seen else own


def _spread(total: Tensor, part: Tensor, seen: int, start: int, stop: int) -> None:
    """Add what a piece gives to what it looked at."""
    if seen:
        total[:, :seen] += part[:, :seen]
    total[:, start:stop] += part[:, seen:]


AttentionInterface.register(NAME, attend_packed)
AttentionMaskInterface.register(NAME, sdpa_mask)
