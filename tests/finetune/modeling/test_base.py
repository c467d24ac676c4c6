"""The arithmetic against its oracles: transformers' own loss, PEFT's own LoRA, torch's own clipping."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from core.config.sections import HyperParameters
from core.errors import JobError
from core.jobs.protocol import Spec
from core.model.chat_format import TrainingRow
from finetune.data.batches import collate, pack, shared_prefix
from finetune.modeling import lora
from finetune.modeling.base import find_base, load_module
from finetune.modeling.loss import Scorer
from finetune.modeling.lowrank import LoraLinear, draw_keep
from finetune.training.optimizer import all_finite, clip_by_norm, clip_by_value, learning_rate, squares
from tests.support.tiny import quietly, tiny_tokenizer

CPU = torch.device("cpu")


def rows(n=5):
    made = []
    for i in range(n):
        length = 6 + 3 * i
        ids = tuple((7 * i + 11 * j) % 250 + 3 if j < length - 1 else 2 for j in range(length))
        made.append(TrainingRow(ids, tuple(j >= 3 + i for j in range(length))))
    return made


def load(folder, *, dropout=0.0, fill=True):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    lora.add_lora(model, rank=4, alpha=8, dropout=dropout)
    if fill:
        for _, layer in lora.lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.1)
    return model


def gradients(model):
    return [parameter.grad.clone() for parameter in lora.trainable(model)]


def theirs(model, batch):
    """transformers' own loss: labels of -100 where nothing is taught."""
    labels = batch.ids.masked_fill(~batch.taught, -100)
    return model(input_ids=batch.ids, attention_mask=batch.attention, labels=labels).loss


def test_loss_and_gradients_are_those_of_transformers(tiny_folder):
    model, batch = load(tiny_folder), collate(rows(), CPU)
    assert batch.attention is not None
    expected = theirs(model, batch)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = Scorer(model)(batch) / batch.supervised
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(model), wanted, atol=1e-5, rtol=1e-5)


def test_micro_batches_add_up_to_the_whole_step(tiny_folder):
    model = load(tiny_folder)
    scorer, whole = Scorer(model), collate(rows(), CPU)
    (scorer(whole) / whole.supervised).backward()
    wanted = gradients(model)
    model.zero_grad()
    for part in (rows()[:1], rows()[1:2], rows()[2:3], rows()[3:]):
        (scorer(collate(part, CPU)) / whole.supervised).backward()
    torch.testing.assert_close(gradients(model), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prefix", [1, 4, 5])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(tiny_folder, prefix):
    model, start = load(tiny_folder), (1, 50, 60, 70, 80)
    made = [TrainingRow(start + row.ids, (False,) * 5 + row.supervised) for row in rows()]
    padded, packed = collate(made, CPU), pack(made, CPU, prefix=prefix)
    assert (padded.tokens, padded.supervised) == (packed.tokens, packed.supervised)
    assert packed.ids.numel() == padded.tokens - (len(made) - 1) * prefix
    expected = Scorer(model)(padded)
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = Scorer(model)(packed)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradients(model), wanted, atol=1e-4, rtol=1e-4)


def test_the_shared_prefix_ends_before_anything_is_taught():
    def row(ids, taught_from):
        return TrainingRow(tuple(ids), tuple(i >= taught_from for i in range(len(ids))))

    assert shared_prefix([row([1, 2, 3, 4, 9], 4), row([1, 2, 3, 5, 9], 4)]) == 3
    assert shared_prefix([row([1, 2, 3, 4, 9], 3), row([1, 2, 3, 4, 9], 3)]) == 2
    assert shared_prefix([row([7, 2], 1), row([1, 2], 1)]) == 0
    assert shared_prefix([row([1, 2], 0)]) == 0


def test_a_loss_of_more_than_one_chunk_is_the_same(tiny_folder, monkeypatch):
    model, batch = load(tiny_folder), collate(rows(), CPU)
    one = Scorer(model)(batch)
    monkeypatch.setattr("finetune.modeling.loss.CHUNK", 4)
    many = Scorer(model)(batch)
    torch.testing.assert_close(one, many)


def test_the_end_of_an_answer_is_taught_though_it_is_also_padding(tiny_folder):
    """The trap: masking labels by the id of padding un-teaches the end, and the model never stops."""
    model = load(tiny_folder)
    short, long = TrainingRow((5, 6, 2), (False, False, True)), TrainingRow((5, 6, 7, 8, 2), (False,) * 4 + (True,))
    assert collate([short, long], CPU).supervised == 2
    alone = Scorer(model)(collate([short], CPU)) + Scorer(model)(collate([long], CPU))
    torch.testing.assert_close(Scorer(model)(collate([short, long], CPU)), alone)


def peft_twin(folder, model, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=lora.target_names(load_plain(folder)))
    config.save_pretrained(tmp_path)
    save_file(lora.state(model), tmp_path / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder)
    return quietly(lambda: PeftModel.from_pretrained(base, tmp_path, is_trainable=True))


def load_plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_logits_and_gradients_are_those_of_peft(tiny_folder, tmp_path):
    model, batch = load(tiny_folder), collate(rows(), CPU)
    twin = peft_twin(tiny_folder, model, tmp_path).eval()
    torch.testing.assert_close(model(batch.ids).logits, twin(batch.ids).logits, atol=1e-5, rtol=1e-5)
    theirs(twin, batch).backward()
    (Scorer(model)(batch) / batch.supervised).backward()
    found = {name.replace(".default", ""): p.grad for name, p in twin.named_parameters() if p.requires_grad}
    names = list(lora.state(model))
    assert sorted(found) == sorted(names)
    torch.testing.assert_close(gradients(model), [found[name] for name in names], atol=1e-5, rtol=1e-5)


def test_dropout_has_the_gradient_of_what_it_kept():
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(8, 6).double(), rank=2, alpha=4, dropout=0.5).double()
    nn.init.normal_(layer.lora_B)
    layer.base.requires_grad_(False)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def seeded(x, a, b):
        torch.manual_seed(1)
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(seeded, (x, layer.lora_A, layer.lora_B))


def test_dropout_drops_its_share_keeps_the_mean_and_follows_the_seed():
    torch.manual_seed(0)
    keep, factor = draw_keep(torch.Size((500, 401)), 0.05, torch.zeros(1))
    assert keep.mean().item() == pytest.approx(0.95, abs=0.005)
    assert factor == pytest.approx(1 / 0.95, rel=1e-4)
    torch.manual_seed(0)
    assert torch.equal(keep, draw_keep(torch.Size((500, 401)), 0.05, torch.zeros(1))[0])
    assert not torch.equal(keep, draw_keep(torch.Size((500, 401)), 0.05, torch.zeros(1))[0])


def test_without_lora_it_is_the_base_model(tiny_folder):
    model, base, ids = load(tiny_folder), load_plain(tiny_folder), torch.arange(9)[None]
    changed = model(ids).logits
    with lora.without_lora(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
    assert torch.equal(model(ids).logits, changed)


def test_the_output_layer_is_no_target_even_when_it_is_not_tied(tiny_folder):
    assert "lm_head" not in lora.target_names(load_plain(tiny_folder))
    assert len(lora.target_names(load_plain(tiny_folder))) == 7


def test_a_model_that_caps_its_logits_is_refused(tiny_folder):
    class Capped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.device = inner, inner.config, inner.device
            self.base_model_prefix, self.model = "model", inner.model
            self.get_output_embeddings = inner.get_output_embeddings

        def forward(self, **arguments):
            out = self.inner(**arguments)
            out.logits = torch.tanh(out.logits / 3) * 3 + 1
            return out

    with pytest.raises(JobError, match="scales or caps"):
        Scorer(Capped(load_plain(tiny_folder)))


def test_clipping_by_value_comes_first_and_counts_what_it_touches():
    grads = [torch.tensor([10.0, 0.5]), torch.tensor([-10.0, 0.0])]
    assert clip_by_value(grads, 1.0) == 2
    assert squares(grads) == pytest.approx(1.5**2)
    clip_by_norm(grads, 1.5, 1.0)
    assert math.sqrt(sum(float((g * g).sum()) for g in grads)) == pytest.approx(1.0)
    # The other way round the outliers would have taken nearly the whole norm, and the value clip done nothing.
    assert grads[0][1].item() == pytest.approx(0.5 / 1.5)


def test_a_small_gradient_is_not_scaled_up_and_zero_is_off():
    grads = [torch.tensor([0.3, 0.4])]
    assert squares(grads) == pytest.approx(0.25)
    clip_by_norm(grads, 0.5, 1.0)
    assert clip_by_value(grads, 0.0) == 0
    clip_by_norm(grads, 50.0, 0.0)
    torch.testing.assert_close(grads[0], torch.tensor([0.3, 0.4]))


def test_one_value_that_is_not_finite_is_seen() -> None:
    for bad in [math.nan, math.inf, -math.inf]:
        assert all_finite([torch.ones(3), torch.ones(2)])
        assert not all_finite([torch.ones(3), torch.tensor([1.0, bad])])


def test_the_learning_rate_warms_up_and_comes_down():
    hyper = HyperParameters(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, hyper) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    constant = HyperParameters(learning_rate=1.0, warmup=0.1, schedule="constant")
    assert {learning_rate(step, 100, constant) for step in range(10, 100)} == {1.0}


def test_a_model_with_sinks_is_loaded_and_scored_by_its_own_attention(tmp_path):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    GptOssForCausalLM(
        GptOssConfig(vocab_size=300, hidden_size=32, intermediate_size=64, **sizes, **experts)
    ).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = Spec("1", str(tmp_path), "", "data.jsonl", "0" * 64, "acme@1")
    model, batch = load_module(find_base(spec, tmp_path), spec), collate(rows(), CPU)
    torch.testing.assert_close(Scorer(model)(batch) / batch.supervised, theirs(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["GPT2", "Falcon"])
def test_layers_that_are_linear_by_another_name_train_as_peft_trains_them(tmp_path, kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    spec = Spec("1", str(folder), "", "data.jsonl", "0" * 64, "acme@1")
    model, batch = load_module(find_base(spec, tmp_path), spec), collate(rows(), CPU)
    plain = load_plain(folder)
    torch.testing.assert_close(model(batch.ids).logits, plain(batch.ids).logits, atol=1e-5, rtol=1e-5)
    layers = lora.add_lora(model, rank=4, alpha=8, dropout=0.0)
    for _, layer in lora.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    LoraConfig(r=4, lora_alpha=8, target_modules=layers, fan_in_fan_out=kind == "GPT2").save_pretrained(tmp_path)
    save_file(lora.state(model), tmp_path / "adapter_model.safetensors")
    twin = quietly(lambda: PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)).eval()
    theirs(twin, batch).backward()
    (Scorer(model)(batch) / batch.supervised).backward()
    wanted = {name.replace(".default", ""): p.grad for name, p in twin.named_parameters() if p.requires_grad}
    torch.testing.assert_close(
        dict(zip(lora.state(model), gradients(model), strict=True)), wanted, atol=1e-5, rtol=1e-4
    )
