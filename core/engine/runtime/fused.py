"""Forward pass of llama-like models in fewer, larger operators.

Family specifics live here: Llama, Mistral, Qwen2, Qwen3 and models that share their classes (SmolLM2). q/k/v and
gate/up are one product each, over weights that the model's own modules view (or packed ones, core.engine.cpu.packed);
one rotary product covers queries and keys; grouped heads become further queries of one key. On a CPU with compiled
operators core.engine.runtime.compiled_layers runs the same layers in one call. `fuse` returns None for other models,
which run their own forward pass. The parity check at load covers both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.engine.cpu.int8 import Int8Linear, LinearSlice, merge_int8
from core.engine.cpu.packed import PackedLinear, packable
from core.engine.runtime.attention import attention_over_slots
from core.engine.runtime.kv_cache import SlotCache, SlotLayer, SlotSegment

FAMILY = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # model_type -> class prefix

MADE = "_distributary_fused"

AddLora = Callable[[str, Tensor, Tensor], None]  # (first module of the group, input, output to add to)


class RmsNormWeights:
    """Root mean square normalization (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.detach(), eps

    def __call__(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Normalize x + delta; x becomes x + delta."""
        if delta is not None:
            x += delta
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Merged products of one decoder layer, the names adapters know them by, and its norms."""

    qkv: nn.Module
    out: nn.Module
    gate_up: nn.Module
    down: nn.Module
    names: tuple[str, str, str, str]  # first module of each product's group
    norm: RmsNormWeights
    mlp_norm: RmsNormWeights
    q_norm: RmsNormWeights | None
    k_norm: RmsNormWeights | None


class FusedModel:
    """The model's forward pass in two parts: tokens to the last state of each row, and states to logits."""

    def __init__(self, module: Any) -> None:
        self.module, self.inner, self.head = module, module.model, _alone(module.lm_head)
        config = module.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.groups: list[tuple[str, ...]] = []
        self.layers = [self._layer(f"model.layers.{i}", layer) for i, layer in enumerate(self.inner.layers)]
        self.norm = _norm(self.inner.norm)
        self.groups.append(("lm_head",))
        self.windows: list[int | None] = []
        first = self.inner.layers[0].self_attn
        self.head_dim: int = first.head_dim
        self.scale: float = first.scaling

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is fused again: packed weights cannot be copied."""

    def _layer(self, name: str, layer: Any) -> DecoderLayer:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [
            tuple(f"{name}.self_attn.{part}_proj" for part in "qkv"),
            (f"{name}.self_attn.o_proj",),
            (f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
            (f"{name}.mlp.down_proj",),
        ]
        self.groups += groups
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return DecoderLayer(
            qkv=_merge(attention, ("q_proj", "k_proj", "v_proj")),
            out=_alone(attention.o_proj),
            gate_up=_merge(mlp, ("gate_proj", "up_proj")),
            down=_alone(mlp.down_proj),
            names=(groups[0][0], groups[1][0], groups[2][0], groups[3][0]),
            norm=_norm(layer.input_layernorm),
            mlp_norm=_norm(layer.post_attention_layernorm),
            q_norm=None if q_norm is None else _norm(q_norm),
            k_norm=None if k_norm is None else _norm(k_norm),
        )

    def begin(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """ids and positions (N,) -> embeddings (N, hidden), and cos and sin (N, head_dim) of the rotary positions.

        The first half of sin is negated, for x cos + roll(x) sin.
        """
        x = self.inner.embed_tokens(ids)
        cos, sin = self.inner.rotary_emb(x, positions[None])  # (1, N, head_dim)
        return x, (cos[0].contiguous(), _signed(sin[0]))

    def states(
        self,
        ids: Tensor,
        segments: Sequence[SlotSegment],
        cache: SlotCache,
        lora: AddLora | None,
    ) -> Tensor:
        """ids (N,), segment by segment and row by row -> (B, hidden), the head's input for the last token of each row.

        Products run over all tokens at once, attention by segment.
        """
        positions = torch.cat([segment.positions.flatten() for segment in segments])
        x, rope = self.begin(ids, positions)
        delta: Tensor | None = None
        for i, layer in enumerate(self.layers):
            delta = self._attention(i, layer, layer.norm(x, delta), rope, segments, cache, lora)
            gate_up = _product(layer.gate_up, layer.names[2], layer.mlp_norm(x, delta), lora)
            delta = _product(layer.down, layer.names[3], _activate(gate_up), lora)
        x = x if delta is None else x + delta
        x = torch.cat([x[segment.tokens].view(segment.rows, -1, x.shape[-1])[:, -1] for segment in segments])
        return self.norm(x)

    def logits(self, states: Tensor, lora: AddLora | None) -> Tensor:
        """(B, hidden) -> (B, V)."""
        return _product(self.head, "lm_head", states, lora)

    def _attention(
        self,
        index: int,
        layer: DecoderLayer,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Sequence[SlotSegment],
        cache: SlotCache,
        lora: AddLora | None,
    ) -> Tensor:
        heads, kv = self.heads, self.kv_heads
        qkv = _product(layer.qkv, layer.names[0], x, lora)
        qkv = qkv.view(len(x), heads + 2 * kv, self.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv[:, :heads] = layer.q_norm(qkv[:, :heads])
            qkv[:, heads : heads + kv] = layer.k_norm(qkv[:, heads : heads + kv])
        qk, v = self._rotated(qkv, rope)
        held, window = cache.layers[index], self.windows[index]
        outs = [self._slot_attention(qk[one.tokens], v[one.tokens], held, one, window) for one in segments]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return _product(layer.out, layer.names[1], out, lora)

    def _slot_attention(
        self, qk: Tensor, v: Tensor, held: SlotLayer, segment: SlotSegment, window: int | None
    ) -> Tensor:
        """qk (rows * T, heads + kv, head_dim), rotated, v (rows * T, kv, head_dim) -> (rows * T, heads * head_dim)."""
        heads, kv = self.heads, self.kv_heads
        shape = (segment.rows, -1, kv, self.head_dim)
        keys, values = held.put(segment, qk[:, heads:].view(shape).transpose(1, 2), v.view(shape).transpose(1, 2))
        # Heads that share a key become further queries of it: (rows, kv, group * T, head_dim).
        q = qk[:, :heads].view(segment.rows, -1, kv, heads // kv, self.head_dim)
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = attention_over_slots(q, keys, values, segment, window, self.scale)
        out = out.view(segment.rows, kv, heads // kv, -1, self.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(-1, heads * self.head_dim)

    def _rotated(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys (N, heads + kv, head_dim) with rotary positions applied, and values (N, kv, head_dim)."""
        rotated = self.heads + self.kv_heads
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        cos, sin = rope
        return torch.addcmul(qk * cos[:, None], qk.roll(self.head_dim // 2, -1), sin[:, None]), v


def fuse(module: nn.Module) -> FusedModel | None:
    """The model's fused forward pass, or None if it is not exactly of the family. Its linear weights become views of
    merged ones.
    """
    config: Any = module.config
    prefix = FAMILY.get(config.model_type)
    if prefix is None or type(module).__name__ != f"{prefix}ForCausalLM" or config.hidden_act != "silu":
        return None
    kinds = {type(child).__name__ for child in module.modules() if not list(child.children())}
    known = {"Linear", "Int8Linear", "LinearSlice", "Embedding", f"{prefix}RMSNorm", f"{prefix}RotaryEmbedding"}
    if kinds - known - {"SiLU", "SiLUActivation"}:
        return None  # quantized by another library, or an unknown layer
    fused: FusedModel | None = getattr(module, MADE, None)
    if fused is None:
        fused = FusedModel(module)
        setattr(module, MADE, fused)  # once per model: merging again would copy the weights
    fused.windows = [_window(config, layer.self_attn) for layer in fused.inner.layers]
    return fused


def _window(config: Any, attention: Any) -> int | None:
    """Tokens that the layer sees; None is all. Mistral's layers are alike, Qwen's differ."""
    window: int | None = getattr(config if config.model_type == "mistral" else attention, "sliding_window", None)
    return window


def _product(linear: nn.Module, name: str, x: Tensor, lora: AddLora | None) -> Tensor:
    y: Tensor = linear(x)
    if lora is not None:
        lora(name, x, y)
    return y


def _activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _norm(module: Any) -> RmsNormWeights:
    return RmsNormWeights(module.weight, module.variance_epsilon)


def _signed(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def _alone(linear: Any) -> nn.Module:
    """A linear that shares its input with no other."""
    return PackedLinear([linear.weight], linear.bias) if packable(linear) else linear


def _merge(owner: Any, names: Sequence[str]) -> nn.Module:
    """One linear with the named ones' outputs side by side. They become views of it, or stay as they are."""
    parts: list[Any] = [getattr(owner, name) for name in names]
    if isinstance(parts[0], Int8Linear):
        whole = merge_int8(parts)
        start = 0
        for name, part in zip(names, parts, strict=True):
            setattr(owner, name, LinearSlice(whole, start, part.out_features))
            start += part.out_features
        return whole
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    if all(map(packable, parts)):
        return PackedLinear([part.weight for part in parts], bias)
    weight = torch.cat([part.weight for part in parts])
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        merged.bias = nn.Parameter(bias, requires_grad=False)
    start = 0
    for part in parts:
        stop = start + part.out_features
        part.weight = nn.Parameter(weight[start:stop], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[start:stop], requires_grad=False)
        start = stop
    return merged
