"""Layers that read the same input are worked off as one, and nothing else of them changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.modeling import lora
from finetune.modeling.lowrank import LoraLinear, Siblings, draw_keep


def layers(dropout: float, *, biases=(True, False)) -> list[LoraLinear]:
    torch.manual_seed(0)
    made = []
    for width, bias in zip((6, 4), biases, strict=True):
        base = nn.Linear(8, width, bias=bias).double().requires_grad_(False)
        made.append(LoraLinear(base, rank=2 + bias, alpha=4, dropout=dropout).double())
        nn.init.normal_(made[-1].lora_B)
    return made


def brothers(dropout: float) -> list[LoraLinear]:
    made = layers(dropout)
    siblings = Siblings(made)
    for layer in made:
        layer.siblings = siblings
    return made


def test_in_a_model_they_are_those_that_read_the_same_tensor(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    lora.add_lora(model, rank=4, alpha=8, dropout=0.0)
    block = model.model.layers[0]
    for name, size in (("self_attn.q_proj", 3), ("self_attn.o_proj", 1), ("mlp.up_proj", 2), ("mlp.down_proj", 1)):
        assert len(block.get_submodule(name).siblings.layers) == size
    assert block.self_attn.q_proj.siblings is block.self_attn.v_proj.siblings
    assert block.self_attn.q_proj.siblings is not model.model.layers[1].self_attn.q_proj.siblings


@pytest.mark.parametrize("moved", [False, True], ids=["together", "moved apart"])
def test_together_they_give_what_each_gives_alone(moved):
    alone, together = layers(0.0), brothers(0.0)
    if moved:
        for layer in together:
            layer.base.weight = nn.Parameter(layer.base.weight.clone(), requires_grad=False)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    wanted, found = [layer(x) for layer in alone], [layer(twin) for layer in together]
    torch.testing.assert_close(found, wanted)
    sum(y.square().sum() for y in wanted).backward()
    sum(y.square().sum() for y in found).backward()
    torch.testing.assert_close(twin.grad, x.grad)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close((one.lora_A.grad, one.lora_B.grad), (other.lora_A.grad, other.lora_B.grad))


def test_they_share_what_dropout_keeps():
    first, second = brothers(0.5)
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    found = [first(x), second(x)]
    torch.manual_seed(1)
    keep, factor = draw_keep(x.shape, 0.5, x)
    assert 0 < keep.mean() < 1
    for layer, y in zip((first, second), found, strict=True):
        low = (x * keep * factor) @ layer.lora_A.T
        torch.testing.assert_close(y, layer.base(x) + layer.scale * low @ layer.lora_B.T)


def test_their_gradients_are_those_of_what_was_kept():
    first, second = brothers(0.5)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def seeded(x, *pairs):
        torch.manual_seed(1)
        one, other = copy.copy(first), copy.copy(second)
        for layer, (a, b) in zip((one, other), (pairs[:2], pairs[2:]), strict=True):
            layer._parameters = {"lora_A": a, "lora_B": b}
        siblings = Siblings((one, other))
        one.siblings = other.siblings = siblings
        return one(x), other(x)

    assert torch.autograd.gradcheck(seeded, (x, first.lora_A, first.lora_B, second.lora_A, second.lora_B))


def test_each_input_is_computed_anew_and_in_any_order():
    first, second = brothers(0.0)
    x, y = torch.randn(2, 3, 8, dtype=torch.float64).unbind()
    alone = layers(0.0)
    torch.testing.assert_close(second(x), alone[1](x))
    torch.testing.assert_close(second(y), alone[1](y))  # the first was never asked for x
    torch.testing.assert_close(first(y), alone[0](y))
    torch.testing.assert_close(first(x), alone[0](x))
    with torch.no_grad():
        first.lora_B.zero_()
    torch.testing.assert_close(first(x), first.base(x))
