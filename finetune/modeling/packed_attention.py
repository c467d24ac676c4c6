"""Attention over packed rows: each row attends to the shared prefix and itself.

A dense mask makes torch compute every pair of tokens. Here rows of similar length, and heads that share a key, go in
one product, and the probabilities are saved for backward. CPU, float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.data.packed_layout import Layout, PackedRows, layout_of

NAME = "distributary-packed"
SCORES_KEPT = 2**22  # scores saved per layer at most (16 MiB); beyond that torch's kernel and the dense mask


def use(model: Any) -> None:
    """Use packed attention for masks with a layout. Models without SDPA (capped scores, sinks) are left alone."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, kv_heads, T, D) -> (1, T, H, D)."""
    layout = layout_of(attention_mask)
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
    """Heads that share a key, as further tokens: (R, H, L, D) -> (R * kv, group * L, D)."""
    return laid.view(len(laid) * kv, -1, laid.shape[-1])


def _by_head(given: Tensor, heads: int, piece: PackedRows) -> Tensor:
    """Inverse of `_by_key`: (R * kv, group * L, D) -> (R, H, L, D)."""
    return given.view(len(piece.own), heads, piece.longest, -1)


AttentionInterface.register(NAME, attend_packed)
AttentionMaskInterface.register(NAME, sdpa_mask)
