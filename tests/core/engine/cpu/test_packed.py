"""Packed float32 linears equal plain ones, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.engine.cpu.compiled import compiled
from core.engine.cpu.packed import PackedLinear, packable

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
no_compiler = pytest.mark.skipif(compiled() is None, reason="no compiler here")


@pytest.fixture(params=["oneDNN", pytest.param("ours", marks=no_compiler)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "oneDNN":
        monkeypatch.setattr("core.engine.cpu.packed.compiled", lambda: None)
    return str(request.param)


@needs_onednn
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("shape", "bias"), [((1, 40), True), ((2, 5, 40), False), ((300, 40), True)])
@torch.inference_mode()
def test_the_product_equals_the_plain_one(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    x = torch.randn(shape)
    assert packable(plain)
    assert torch.allclose(PackedLinear([plain.weight], plain.bias)(x), plain(x), atol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_an_outlier_in_one_row_changes_no_other() -> None:
    torch.manual_seed(0)
    layer, x = PackedLinear([torch.randn(24, 40)], None), torch.randn(5, 40)
    calm = layer(x)
    for outlier in (1e30, float("inf"), float("nan")):
        x[2] *= outlier
        assert torch.equal(layer(x)[[0, 1, 3, 4]], calm[[0, 1, 3, 4]])


def test_other_weights_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packable(nn.Linear(4, 4, dtype=torch.bfloat16))
    assert not packable(nn.Linear(4, 4, device="meta"))
    assert not packable(nn.Embedding(4, 4))
    assert packable(nn.Linear(4, 4))
    monkeypatch.setattr("core.engine.cpu.packed.compiled", lambda: None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packable(nn.Linear(4, 4))


@needs_onednn
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_merged_parts_are_one_product(bias: bool) -> None:
    parts = [nn.Linear(40, width, bias=bias) for width in (24, 8)]
    layer = PackedLinear(
        [part.weight.detach() for part in parts], torch.cat([p.bias.detach() for p in parts]) if bias else None
    )
    x = torch.randn(1, 40)
    wanted = torch.cat([part(x) for part in parts], dim=1)
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert torch.allclose(layer(torch.cat((x, x)))[:1], wanted, atol=1e-5)
    assert layer(x[None]).shape == (1, 1, 32)
