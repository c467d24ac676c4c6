"""Products with frozen matrices: the same numbers by either library, and only where both sides suit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.modeling import matmul


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 3, 5), (7, 48, 16), (130, 576, 1536)])
def test_either_way_gives_the_products(
    monkeypatch: pytest.MonkeyPatch, amd: bool, rows: int, outs: int, ins: int
) -> None:
    monkeypatch.setattr(matmul, "_is_amd", lambda: amd)
    dice = torch.Generator().manual_seed(rows)
    x, grad = torch.randn(rows, ins, generator=dice), torch.randn(rows, outs, generator=dice)
    weight, bias = nn.Parameter(torch.randn(outs, ins, generator=dice)), torch.randn(outs, generator=dice)
    with torch.no_grad():
        there, back = matmul.forward(x, weight, bias), matmul.backward(grad, weight)
    exact = weight.detach().double()
    wanted_there = (x.double() @ exact.T + bias.double()).float()
    wanted_back = (grad.double() @ exact).float()
    assert torch.allclose(there, wanted_there, rtol=0, atol=1e-5 * float(wanted_there.abs().max()))
    assert torch.allclose(back, wanted_back, rtol=0, atol=1e-5 * float(wanted_back.abs().max()))


def test_other_types_go_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_is_amd", lambda: True)
    monkeypatch.setattr(matmul, "_onednn", lambda *given: pytest.fail("not made for these"))
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    assert matmul.forward(torch.ones(1, 3, dtype=torch.bfloat16), weight).tolist() == [[3, 3]]
    assert matmul.backward(torch.ones(1, 2, dtype=torch.bfloat16), weight).tolist() == [[2, 2, 2]]
