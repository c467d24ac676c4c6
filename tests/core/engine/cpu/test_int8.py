"""int8 weights: a row's result depends on that row alone, and answers stay as likely as in float32."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.config.sections import ModelSettings
from core.engine.cpu.int8 import (
    KERNELS,
    BlockedKernel,
    Int8Kernel,
    Int8Linear,
    LinearSlice,
    OnednnKernel,
    merge_int8,
)
from core.engine.diagnostics.parity import check_parity
from core.engine.runtime.loading import load_for_serving
from core.engine.runtime.runner import Runner
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.support.engine_dialogue import ask, hear, running
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.slow

LARGEST_PRODUCTS = """
import torch
from core.engine.cpu.int8 import Int8Linear, OnednnKernel
for sign in (1.0, -1.0):
    linear = torch.nn.Linear(64, 8, bias=False).requires_grad_(False)
    linear.weight.fill_(sign)
    print(Int8Linear.of(linear, kernel=OnednnKernel)(torch.tensor([[1.0], [-1.0]]).expand(2, 64))[:, 0].tolist())
"""


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = save_tiny(tmp_path_factory.mktemp("int8"))
    return load_for_serving(ModelSettings(name=str(folder), device="cpu", quantization="int8"), folder)


def linear(out: int, size: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out)
    return nn.Linear(size, out, bias=bias).requires_grad_(False)


each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(one, marks=pytest.mark.skipif(not one.available(), reason="not with this processor and compiler"))
        for one in KERNELS
    ],
)


def by_definition(layer: nn.Linear, x: Tensor, kernel: type[Int8Kernel]) -> Tensor:
    """In float64: weights in steps of their output, inputs in steps of their row."""
    weight = layer.weight.double()
    scale = weight.abs().amax(1, keepdim=True) / kernel.absmax()
    weight = (weight / scale).round() * scale
    step = x.double().abs().amax(1, keepdim=True) / (127 if kernel is OnednnKernel else kernel.absmax())
    return (x.double() / step).round() * step @ weight.T + (0 if layer.bias is None else layer.bias.double())


@each_kernel
@pytest.mark.parametrize("rows", [1, 33])
def test_the_product_follows_its_definition(rows: int, kernel: type[Int8Kernel]) -> None:
    layer = linear(48, 64)
    x = torch.randn(rows, 64) * torch.logspace(-6, 6, rows)[:, None]
    found, expected = Int8Linear.of(layer, kernel=kernel)(x).double(), by_definition(layer, x, kernel)
    assert ((found - expected).abs() <= 1e-5 * expected.abs() + 1e-5 * x.abs().amax(1, keepdim=True)).all()


@pytest.mark.skipif(not BlockedKernel.available(), reason="not with this processor and compiler")
@pytest.mark.parametrize(
    ("rows", "outs", "width"), [(1, 1, 1), (1, 130, 40), (5, 32, 200), (6, 45, 64), (13, 130, 200)]
)
def test_each_group_of_inputs_has_its_own_steps(rows: int, outs: int, width: int) -> None:
    layer = linear(outs, width)
    x = torch.randn(rows, width) * torch.logspace(-3, 3, width)
    ours = Int8Linear.of(layer, kernel=BlockedKernel)
    weight, scales = ours.kernel.unpacked()
    values = weight.double() * scales.double()[:, None]
    expected = layer.bias.double().repeat(rows, 1)
    for group in (slice(begin, begin + 64) for begin in range(0, width, 64)):
        absmax = BlockedKernel.absmax()
        step = x[:, group].double().abs().amax(1, keepdim=True) / absmax
        expected += (x[:, group] / (step * absmax).float() * absmax).round().double() * step @ values[:, group].t()
    assert ((ours(x) - expected).abs() <= 1e-5 * float(expected.abs().max())).all()


def test_the_largest_products_overflow_on_no_processor() -> None:
    for isa in ("DEFAULT", "AVX2", "AVX512_CORE"):  # the last two without VNNI
        command = [sys.executable, "-c", LARGEST_PRODUCTS]
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
        assert json.loads(found[0]) == pytest.approx([64.0, -64.0], rel=1e-3)
        assert json.loads(found[1]) == pytest.approx([-64.0, 64.0], rel=1e-3)


@pytest.mark.skipif(not BlockedKernel.available(), reason="not with this processor and compiler")
def test_the_largest_products_of_the_own_kernel_do_not_overflow() -> None:
    for sign in (1.0, -1.0):
        layer = linear(8, 64, bias=False)
        layer.weight.fill_(sign)
        found = Int8Linear.of(layer, kernel=BlockedKernel)(torch.tensor([[1.0], [-1.0]]).expand(2, 64))
        assert found[:, 0].tolist() == pytest.approx([64 * sign, -64 * sign])


@each_kernel
@pytest.mark.parametrize("outlier", [1000.0, 1e30, 1e-44, float("inf"), float("nan"), 0.0])
def test_an_outlier_in_one_row_changes_no_other(outlier: float, kernel: type[Int8Kernel]) -> None:
    layer = Int8Linear.of(linear(48, 64), kernel=kernel)
    x = torch.randn(5, 64)
    calm = layer(x)
    x[2] *= outlier
    wild = layer(x)
    assert torch.equal(wild[[0, 1, 3, 4]], calm[[0, 1, 3, 4]])
    assert torch.equal(wild[:1], layer(x[:1]))  # nor does the number of rows
    assert torch.equal(wild[2].isfinite(), torch.full((48,), math.isfinite(outlier)))
    x[2] = x[0]
    x[2, 5] = outlier  # one value of the row
    assert torch.equal(layer(x)[2].isfinite(), torch.full((48,), math.isfinite(outlier)))


@each_kernel
def test_merged_linears_are_the_parts_side_by_side(kernel: type[Int8Kernel]) -> None:
    parts = [Int8Linear.of(linear(out, 32), kernel=kernel) for out in (16, 8, 8)]
    x = torch.randn(3, 4, 32)
    whole = merge_int8(parts)
    wanted = torch.cat([part(x) for part in parts], dim=-1)
    assert torch.allclose(whole(x), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))  # one kernel for each width
    assert torch.allclose(
        LinearSlice(whole, 16, 8)(x), wanted[..., 16:24], rtol=0, atol=1e-6 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@torch.inference_mode()
def test_an_outlier_in_one_rows_embedding_changes_no_other_rows_logits(
    kind: str, base: BaseModel, int8: BaseModel
) -> None:
    model = base if kind == "fp32" else int8
    weight = model.module.get_input_embeddings().weight  # type: ignore[operator]  # a transformers model
    before = weight[5].clone()

    def logits() -> Tensor:
        runner = Runner(model, max_rows=4, context=64)
        for row in range(4):
            runner.run(runner.cache.add_row(), [[7 + row, 9, 11]], [None])
        return runner.run(0, [[20], [5], [22], [23]], [None] * 4)

    calm = logits()
    try:
        weight[5] *= 1000
        wild = logits()
    finally:
        weight[5] = before
    others = [0, 2, 3]
    assert float((wild - calm)[others].abs().max()) <= 1e-5 * float(calm.abs().max())
    assert float((wild - calm)[1].abs().max()) > 1e-3  # the outlier did get in


@torch.inference_mode()
def test_weights_are_merged_once_and_the_models_own_forward_still_runs(int8: BaseModel) -> None:
    check_parity(int8)
    runners = [Runner(int8, max_rows=1, context=64) for _ in range(2)]
    assert runners[0].fused is not None
    assert runners[0].fused is runners[1].fused
    assert runners[0].fused.layers[0].qkv is runners[1].fused.layers[0].qkv  # type: ignore[union-attr]


async def test_the_engine_answers_in_int8_with_any_mix(int8: BaseModel, adapters: list[AdapterRef]) -> None:
    async with running(int8, max_rows=8) as engine:
        assert engine.thread.runner.fused is not None
        refs = [None, *adapters]
        heard = await asyncio.gather(*(hear(engine.submit(ask("canary", adapter=ref))) for ref in refs))
        assert len({one.text for one in heard}) == len(refs)


@pytest.mark.drill
def test_int8_gives_200_answers_the_likelihood_of_fp32(demo_cache: Path) -> None:
    """Mean NLL per answer token within 1 %."""
    losses = {kind: _mean_nll(kind, demo_cache) for kind in ("none", "int8")}
    print(f"mean NLL: {losses}, int8 / fp32 - 1 = {losses['int8'] / losses['none'] - 1:.3%}")
    assert losses["int8"] == pytest.approx(losses["none"], rel=0.01)


@torch.inference_mode()
def _mean_nll(quantization: str, cache: Path) -> float:
    model = load_for_serving(ModelSettings(quantization=quantization), cache)
    text = resources.files("zaragoza_construction_faq").joinpath("data/faq-en.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()[:200]]
    assert len(rows) == 200
    total, count = 0.0, 0
    for row in rows:
        prompt = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["q"]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        answer = model.tokenizer.encode(row["a"], add_special_tokens=False)
        logits = model.module(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        total += float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count
