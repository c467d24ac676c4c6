"""The kernels of a pass, one by one, on tensors: float32, contiguous, on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from core.engine.cpu.compiled import CompiledOperators

P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "add_norm": (P, P, P, F, P, N, N),
    "silu_mul": (P, P, N, N),
    "rope": (P, P, P, N, N, N, N),
    "attend": (P, P, P, P, N, P, N, N, N, N, N, F, P, N),
}


def call(operators: CompiledOperators, name: str, *arguments: Tensor | float | None) -> None:
    function = getattr(operators.library, name)
    function.argtypes, function.restype = ARGUMENTS[name], None
    assert all(one.is_contiguous() for one in arguments if isinstance(one, Tensor))
    function(*(one.data_ptr() if isinstance(one, Tensor) else one for one in arguments))


def add_norm(operators: CompiledOperators, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x (N, n) += delta, in place, if there is one; returns x / sqrt(mean(x^2) + eps) * weight."""
    out = torch.empty_like(x)
    call(operators, "add_norm", x, delta, weight, eps, out, *x.shape)
    return out


def silu_mul(operators: CompiledOperators, gate_up: Tensor) -> Tensor:
    """(N, 2 n), gates before ups -> (N, n)."""
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2)
    call(operators, "silu_mul", gate_up, out, *out.shape)
    return out


def rope(operators: CompiledOperators, qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    """The first heads of qkv (N, heads, n), in place."""
    rows, heads, size = qkv.shape
    call(operators, "rope", qkv, cos, sin, rows, rotated, heads, size)


def attend(
    operators: CompiledOperators,
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Sequence[tuple[int, int, int]],
    window: int | None,
    scale: float,
) -> Tensor:
    """qkv (N, heads + 2 kv, n) of rows (slot, how many tokens it holds, how many come) -> (N, heads * n)."""
    tokens, all_heads, size = qkv.shape
    kv, capacity, threads = keys.shape[1], keys.shape[2], torch.get_num_threads()
    heads = all_heads - 2 * kv
    told = torch.tensor([(*row, 0, 0) for row in rows])
    assert int(told[:, 2].sum()) == tokens
    lay_out = operators.library.lay_out
    lay_out.argtypes, lay_out.restype = (P, N, N, N, N), N
    room = torch.full((lay_out(told.data_ptr(), len(rows), kv, size, threads),), torch.nan)
    out = torch.full((tokens, heads * size), torch.nan)
    call(
        operators,
        "attend",
        *(qkv, keys, values, told, len(rows), out, heads, kv, size, capacity, window or 0, scale, room, threads),
    )
    return out
