"""All layers of a llama-like model in one call of the compiled kernels, without the GIL.

The ctypes structures mirror kernels/layers.cpp. Weight pointers are set once, pointers to KV and adapter slots whenever
those are reallocated, and the pass's own with each call.
"""

import ctypes

import torch
from torch import Tensor, nn

from core.engine.cpu.compiled import CompiledOperators
from core.engine.cpu.int8 import BlockedKernel, Int8Linear
from core.engine.cpu.packed import PackedLinear
from core.engine.lora.layers import StackedLora
from core.engine.lora.slots import AdapterSlots
from core.engine.runtime.fused import FusedModel, RmsNormWeights
from core.engine.runtime.kv_cache import SlotCache

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _NormPointers(ctypes.Structure):
    _fields_ = (("weight", _P), ("eps", _F))


class _LinearPointers(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("floats", "bytes", "scales", "bias")),
        *((name, _N) for name in ("in", "outs")),
        *((name, _P) for name in ("a", "b")),
        *((name, _N) for name in ("parts", "rank")),
        ("widths", _P),
    )


class _LayerPointers(ctypes.Structure):
    _fields_ = (
        *((name, _NormPointers) for name in ("norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, _LinearPointers) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _P) for name in ("keys", "values")),
        *((name, _N) for name in ("capacity", "window")),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, _N) for name in ("tokens", "rows", "tiles", "threads")),
        *((name, _N) for name in ("hidden", "heads", "kv", "size", "inner")),
        ("scale", _F),
        *((name, _P) for name in ("row", "tile", "cos", "sin", "x")),
    )


class CompiledLayers:
    """A fused model's layers with the KV cache and adapter slots of one runner."""

    def __init__(self, fused: FusedModel, operators: CompiledOperators, cache: SlotCache, lora: AdapterSlots) -> None:
        self.fused, self.operators, self.cache, self.lora = fused, operators, cache, lora
        self._layers = (_LayerPointers * len(fused.layers))()
        for pointers, layer in zip(self._layers, fused.layers, strict=True):
            pointers.norm, pointers.mlp_norm = _norm(layer.norm), _norm(layer.mlp_norm)
            pointers.q_norm, pointers.k_norm = _norm(layer.q_norm), _norm(layer.k_norm)
            pointers.qkv, pointers.out = _linear(layer.qkv), _linear(layer.out)
            pointers.gate_up, pointers.down = _linear(layer.gate_up), _linear(layer.down)
        self._norm = _norm(fused.norm)
        self._versions = (-1, -1)  # of the KV cache and the adapter slots, when pointers were set
        self._widths: list[object] = []
        self._scratch = torch.empty(0)

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor, tiles: Tensor | None) -> Tensor:
        """Embeddings x (N, hidden), overwritten, to each row's last state (B, hidden), normed.

        rope holds cos and sin (N, head_dim), the first half of sin negated. rows int64 (B, 5): slot, tokens it holds,
        tokens of this pass, and two fields that the kernels fill in.
        """
        fused = self.fused
        self._point_to_slots(x)
        given = _Pass(tokens=len(x), rows=len(rows), threads=torch.get_num_threads(), scale=fused.scale)
        given.hidden, given.heads, given.kv, given.size = x.shape[1], fused.heads, fused.kv_heads, fused.head_dim
        given.inner = self._layers[0].gate_up.outs // 2
        given.row, given.x, (given.cos, given.sin) = _at(rows), _at(x), map(_at, rope)
        if tiles is not None:
            given.tile, given.tiles = _at(tiles), len(tiles)
        library = self.operators.library
        needed: int = library.scratch_size(ctypes.byref(given))
        if needed > len(self._scratch):
            self._scratch = torch.empty(0)  # first, so that both never exist at once
            self._scratch = torch.empty(needed)
        states = torch.empty(len(rows), x.shape[1])
        library.run_layers(
            *(self._layers, len(self._layers), ctypes.byref(self._norm), ctypes.byref(given)),
            *(_at(self._scratch), _at(states)),
        )
        return states

    def _point_to_slots(self, x: Tensor) -> None:
        """Set the pointers to KV and adapter slots if those were reallocated, and each layer's window."""
        for pointers, window in zip(self._layers, self.fused.windows, strict=True):
            pointers.window = window or 0
        like = x.new_empty(0, self.fused.kv_heads, self.fused.head_dim)
        held = [layer.whole(like) for layer in self.cache.layers]
        versions = self.cache.version, self.lora.version
        if versions == self._versions:
            return
        self._widths = []
        for pointers, layer, (keys, values) in zip(self._layers, self.fused.layers, held, strict=True):
            pointers.keys, pointers.values, pointers.capacity = _at(keys), _at(values), keys.shape[2]
            for linear, name in zip(
                (pointers.qkv, pointers.out, pointers.gate_up, pointers.down), layer.names, strict=True
            ):
                self._point_to_adapters(linear, self.lora.stacks.get(name))
        self._versions = versions

    def _point_to_adapters(self, linear: _LinearPointers, stack: StackedLora | None) -> None:
        if stack is None:
            linear.a = linear.b = None
            return
        widths = (ctypes.c_int64 * len(stack.outs))(*stack.outs)
        self._widths.append(widths)
        linear.a, linear.b, linear.widths = _at(stack.a), _at(stack.b[0]), ctypes.addressof(widths)
        linear.parts, linear.rank = len(stack.outs), stack.rank


def compiled_layers(fused: FusedModel, cache: SlotCache, lora: AdapterSlots) -> CompiledLayers | None:
    """None without compiled operators, or for weights that they do not support."""
    operators = lora.planner.operators
    linears = [one for layer in fused.layers for one in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    known = all(
        isinstance(one, PackedLinear) or (isinstance(one, Int8Linear) and isinstance(one.kernel, BlockedKernel))
        for one in linears
    )
    return CompiledLayers(fused, operators, cache, lora) if operators is not None and known else None


def _norm(norm: RmsNormWeights | None) -> _NormPointers:
    return _NormPointers() if norm is None else _NormPointers(_at(norm.weight), norm.eps)


def _linear(linear: nn.Module) -> _LinearPointers:
    pointers = _LinearPointers()
    if isinstance(linear, Int8Linear):
        assert isinstance(linear.kernel, BlockedKernel)
        pointers.bytes, pointers.scales = _at(linear.kernel.packed), _at(linear.kernel.scales)
    else:
        assert isinstance(linear, PackedLinear)
        pointers.floats = _at(linear.packed)
    pointers.outs, pointers.bias = linear.out_features, None if linear.bias is None else _at(linear.bias)
    setattr(pointers, "in", linear.in_features)
    return pointers


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
