"""Attention of packed rows against torch's own under a dense mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from core.model.chat_format import TrainingRow
from finetune.data.batches import pack
from finetune.data.packed_layout import Layout
from finetune.modeling import packed_attention
from finetune.modeling.loss import Scorer
from finetune.modeling.memory import checkpoint_activations

CPU = torch.device("cpu")


class Layer(nn.Module):
    num_key_value_groups = 3
    is_causal = True


def batch_of(prefix, own):
    made = [
        TrainingRow(
            tuple(range(3, 3 + prefix)) + tuple((7 * i + 11 * j) % 250 + 3 for j in range(count)),
            (False,) * (prefix + 1) + (True,) * (count - 1),
        )
        for i, count in enumerate(own)
    ]
    return pack(made, CPU, prefix=prefix)


def attended(how, mask, *, seed=0, **options):
    """The result and the gradients of query, key and value: 6 heads over 2 keys."""
    torch.manual_seed(seed)
    count = mask.shape[-1]
    given = [torch.randn(1, count, heads, 8).transpose(1, 2).requires_grad_() for heads in (6, 2, 2)]
    out, _ = how(Layer(), *given, mask, **{"dropout": 0.0, "scaling": 0.3, **options})
    return out.detach(), *torch.autograd.grad(out, given, torch.randn_like(out))


@pytest.fixture
def masked(monkeypatch):
    """The masks that went the dense way."""
    seen = []

    def dense(module, query, key, value, mask, **options):
        seen.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", dense)
    return seen


@pytest.mark.parametrize(
    ("prefix", "own"), [(1, (4,)), (5, (3, 3, 9)), (17, (1, 20, 2)), (2, (30, 1)), (3, (8, 9, 10, 2))]
)
@pytest.mark.parametrize("scaling", [0.3, None])
def test_result_and_gradients_are_those_under_the_dense_mask(masked, prefix, own, scaling):
    mask = batch_of(prefix, own).attention
    ours = attended(packed_attention.attend_packed, mask, scaling=scaling)
    assert not masked
    torch.testing.assert_close(ours, attended(sdpa_attention_forward, mask, scaling=scaling), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, attended(packed_attention.attend_packed, mask, scaling=scaling), atol=0, rtol=0)


def test_what_it_does_not_know_goes_by_the_mask(masked, monkeypatch):
    mask = batch_of(4, (3, 5)).attention
    attended(packed_attention.attend_packed, mask.clone())  # no layout was told of this one
    attended(packed_attention.attend_packed, mask, sliding_window=3)
    attended(packed_attention.attend_packed, mask, dropout=0.5)
    monkeypatch.setattr(packed_attention, "SCORES_KEPT", 6 * Layout(4, (3, 5)).scores() - 1)
    attended(packed_attention.attend_packed, mask)
    assert len(masked) == 4


def test_a_layout_puts_rows_of_like_length_together_and_counts_the_pairs_that_are_looked_at():
    layout = Layout(4, (3, 5, 4))
    assert [(one.seen, one.own) for one in layout.pieces] == [(0, (4,)), (4, (3,)), (4, (5, 4))]
    assert layout.scores() == 4 * 4 + 3 * 7 + 2 * 5 * 9


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_model_led_to_it_has_the_loss_and_gradients_of_before(tiny_folder, masked, recomputed):
    batch = batch_of(5, (6, 9, 4))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)

    def found():
        model.zero_grad()
        loss = Scorer(model)(batch)
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    before = found()
    if recomputed:
        checkpoint_activations(model)
        model.train()
    packed_attention.use(model)
    after = found()
    assert all(mask is None for mask in masked)  # the check of the head has none
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)


def test_a_model_that_attends_by_its_own_code_stays_so(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")
    packed_attention.use(model)
    assert model.config._attn_implementation == "eager"
