"""Attention over KV slots: `attention_over_slots`, and `attend` for models that run their own forward pass.

transformers calls `attend` through its AttentionInterface with what the layer asks for: sliding window, soft cap,
sinks. These come from the model's own code, layer by layer, instead of an interpretation of its configuration. A 4-D
mask passed to the model would silently remove a window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from core.engine.runtime.kv_cache import SlotSegment, active
from core.model.base import attends_by_mask

NAME = "distributary"


@contextmanager
def eager_attention(module: Any) -> Iterator[None]:
    """Let the model run its own eager attention within the block."""
    if attends_by_mask(module.config):
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, kv_heads, length, D) of the active segment -> (B, T, H, D).

    The mask is the segment's. s_aux (H,) are scores of sinks, which take part in the softmax and contribute nothing.
    Raises ValueError for attention that the engine does not support.
    """
    segment = active.segment
    if position_bias is not None:
        raise ValueError("its attention adds a bias by position to the scores")
    if segment is None:
        if softcap is not None or s_aux is not None:
            raise ValueError("outside the engine a model with capped scores or sinks attends by its own code")
        options = {"scaling": scaling, "is_causal": is_causal, **others}
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out
    if is_causal is False:
        raise ValueError("its attention sees tokens that come later")
    rows, heads, count, size = query.shape
    kv = key.shape[1]
    # Heads that share a key become further queries of it: (rows, kv, group * T, head_dim).
    query = query.reshape(rows, kv, heads // kv * count, size)
    scale = size**-0.5 if scaling is None else scaling
    if softcap is None and s_aux is None:
        result = attention_over_slots(query, key, value, segment, sliding_window, scale)
    else:
        bias = segment.bias(sliding_window, 1, heads // kv, query.dtype)
        scores = query @ key.transpose(-1, -2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        sinks = None if s_aux is None else s_aux.view(1, kv, heads // kv, 1).expand(rows, kv, heads // kv, count)
        result = _softmax(scores + bias, sinks) @ value
    return result.view(rows, heads, count, -1).transpose(1, 2).contiguous(), None


def attention_over_slots(
    query: Tensor, key: Tensor, value: Tensor, segment: SlotSegment, window: int | None, scale: float
) -> Tensor:
    """query (B, kv_heads, group * T, D), heads that share a key packed, over (B, kv_heads, length, D) -> as query.

    torch's kernel is made for long prompts. For one token per row on a CPU two batched products are as fast or faster:
    14 against 20 ms on two Zen 4 cores for the 30 layers of SmolLM2-135M, 32 rows of 80 tokens.
    """
    rows, kv, count, _ = query.shape
    tokens = segment.positions.shape[1]
    if not (tokens == 1 and query.device.type == "cpu" and query.dtype is torch.float32):
        bias = segment.bias(window, 1, count // tokens, query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    bias = segment.bias(window, kv, count, query.dtype).flatten(0, 1)
    scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(rows, kv, count, value.shape[3])


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, in float32."""
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    column = sinks.flatten(2, 3)[..., None].to(scores.dtype)
    return torch.softmax(torch.cat((scores, column), dim=-1), dim=-1, dtype=torch.float32)[..., :-1].to(scores.dtype)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
