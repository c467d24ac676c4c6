"""Norms written out give transformers' own numbers, there and back, and keep their weights under their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from finetune.modeling import rms_norm
from finetune.modeling.rms_norm import RmsNorm


def theirs() -> LlamaRMSNorm:
    module = LlamaRMSNorm(16, eps=1e-3)
    nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_output_and_gradients_are_those_of_transformers(size, shape):
    torch.manual_seed(0)
    module, x, grad = theirs(), torch.randn(shape) * size, torch.randn(shape)
    found = []
    for one in (module, RmsNorm(module.weight, module.variance_epsilon)):
        module.weight.grad = None
        own = x.clone().requires_grad_()
        y = one(own)
        y.backward(grad)
        found.append((y.detach(), own.grad, module.weight.grad))
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_gradients_are_those_of_the_numbers():
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 7), (7,)))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm._RmsNormFunction.apply(a, b, 1e-2), (x, weight))


def test_a_frozen_weight_gets_no_gradient():
    module = RmsNorm(nn.Parameter(torch.ones(4), requires_grad=False), 1e-5)
    x = torch.randn(3, 4, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None


def test_a_model_is_the_same_but_for_how_it_computes(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    ids = torch.arange(3, 20)[None]
    names, before = list(model.state_dict()), model(input_ids=ids).logits
    rms_norm.replace_rms_norms(model)
    assert sum(isinstance(child, RmsNorm) for child in model.modules()) == 2 * len(model.model.layers) + 1
    assert list(model.state_dict()) == names
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)


def test_other_weights_stay_as_they_are(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    rms_norm.replace_rms_norms(model)
    assert not any(isinstance(child, RmsNorm) for child in model.modules())
