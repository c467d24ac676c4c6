"""All weights, and a model from nothing: the same loop, the same checks, and a folder that is served."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from core.config.sections import ModelSettings
from core.engine.runtime.loading import load_for_serving
from core.errors import JobError
from core.jobs.protocol import Done, Estimated, Fresh, Judged, Spec
from finetune.check import check
from finetune.data.batches import collate
from finetune.data.plain_text import encode_text
from finetune.data.reader import Report
from finetune.modeling import fresh, memory
from finetune.modeling.loss import Scorer
from finetune.modeling.methods import AllWeights
from finetune.training import train as loop
from finetune.training.checkpoint import BEST, NEWEST
from finetune.training.checkpoints import Interrupted
from finetune.training.train import Trainer
from tests.finetune.conftest import Heard, faq
from tests.finetune.modeling.test_base import CPU, load_plain, rows, theirs
from tests.finetune.training.test_train import go, stop_after
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

SMALL = Fresh(layers=2, hidden=32, heads=4, vocabulary=300, context=128)
TEXT = "\n\n".join(f"Paragraph {n} says that {n} and {n} make {2 * n}.\nIt has a second line." for n in range(120))


def of(folder, **changes):
    spec = Spec.read(folder)
    replace(spec, **changes).write(folder)
    return folder


def scratch(make_job, name="scratch", **hyper):
    folder = make_job(name, data=TEXT.encode(), **{"learning_rate": 5e-3, "max_tokens": 64, **hyper})
    (folder / "data.jsonl").rename(folder / "data.txt")
    return of(folder, method="scratch", data="data.txt", fresh=SMALL, instructions="")


def test_loss_and_gradients_of_all_weights_are_those_of_transformers(tiny_folder):
    model, twin, batch = load_plain(tiny_folder), load_plain(tiny_folder), collate(rows(), CPU)
    AllWeights(model, dropout=0.0, original=lambda: None)
    expected = theirs(twin, batch)
    expected.backward()
    loss = Scorer(model)(batch) / batch.supervised
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    wanted = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-5, msg=name)


def test_dropout_of_all_weights_falls_on_each_block_only_in_training_and_keeps_the_mean(tiny_folder):
    model, ids = load_plain(tiny_folder), torch.arange(40)[None]
    plain = model(ids).logits
    AllWeights(model, dropout=0.3, original=lambda: None)
    torch.testing.assert_close(model.eval()(ids).logits, plain)
    model.train()
    torch.manual_seed(0)
    one = model(ids).logits
    torch.manual_seed(0)
    torch.testing.assert_close(model(ids).logits, one)
    assert not torch.allclose(one, plain)
    block = model.model.layers[0].mlp
    x = torch.randn(200, 100, 32)
    share = (block(x) == 0).float().mean()
    assert 0.28 < share < 0.32
    torch.testing.assert_close(block(x).mean(), block.eval()(x).mean(), atol=2e-3, rtol=0)


def test_a_model_with_all_weights_trained_is_a_folder_that_is_served(make_job, taught_folder):
    folder = of(make_job(base=taught_folder, learning_rate=2e-3, weight_decay=0.01), method="full")
    heard = go(folder)
    (done,) = heard.of(Done)
    assert done.test_loss < done.test_loss_base
    out = folder / "out"
    trained, before = load_plain(out), load_plain(taught_folder)
    changed = [n for (n, one), (_, two) in zip(trained.named_parameters(), before.named_parameters(), strict=True)
               if not torch.equal(one, two)]  # fmt: skip
    assert len(changed) == len(list(trained.named_parameters()))
    best = load_file(folder / "checkpoint" / BEST)
    assert all(torch.equal(best[name], parameter) for name, parameter in trained.named_parameters())
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["method"], manifest["layers"]) == ("full", ["all weights"])
    assert "all its weights" in (out / "README.md").read_text()
    assert load_for_serving(ModelSettings(name=str(out), device="cpu"), folder).tokenizer.chat_template


def test_weight_decay_is_that_of_adamw(make_job, tiny_folder):
    """With a gradient of nothing a step only shrinks: each weight by learning rate times weight decay."""
    folder = of(make_job(weight_decay=0.5, warmup=0.0, schedule="constant", dropout=0.0), method="full")
    spec = Spec.read(folder)
    trainer = Trainer(folder, spec, loop.prepare(folder, spec, Heard()), Heard(), threading.Event())
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (1 - 1e-2 * 0.5))


@pytest.mark.parametrize("method", ["full", "scratch"])
def test_whatever_is_trained_a_cut_changes_no_bit(make_job, monkeypatch, method):
    def job(name):
        return scratch(make_job, name) if method == "scratch" else of(make_job(name, weight_decay=0.1), method="full")

    whole, parts = job("whole"), job("parts")
    go(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        go(parts, stop_after(patch, 3))
    go(parts)
    for name in (NEWEST, BEST):
        one, other = (load_file(folder / "checkpoint" / name) for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "out/model.safetensors").read_bytes() == (parts / "out/model.safetensors").read_bytes()


def test_a_model_from_nothing_learns_a_text_and_is_served(make_job):
    folder = scratch(make_job, epochs=6)
    heard = go(folder)
    (done,) = heard.of(Done)
    assert done.test_loss < done.test_loss_base - 1
    (judged,) = heard.of(Judged)
    assert judged.lift > 0  # it looks at what came before
    served = load_for_serving(ModelSettings(name=str(folder / "out"), device="cpu"), folder)
    assert len(served.tokenizer) <= 300
    assert "from a fresh configuration" in (folder / "out" / "README.md").read_text()
    assert json.loads((folder / "base" / "fresh.json").read_text())["hidden"] == 32


def test_a_model_from_nothing_may_have_the_configured_tokenizer_and_learn_conversations(make_job, tokenizer):
    folder = of(make_job(epochs=4, learning_rate=5e-3), method="scratch", fresh=replace(SMALL, vocabulary=0))
    heard = go(folder)
    assert heard.of(Done)[0].test_loss < heard.of(Done)[0].test_loss_base
    assert AutoTokenizer.from_pretrained(folder / "out").get_vocab() == tokenizer.get_vocab()


def test_the_same_seed_draws_the_same_model(make_job):
    one, two, other = (scratch(make_job, name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    made = [load_file(fresh.fresh_base(f, Spec.read(f), [TEXT]) / "model.safetensors") for f in (one, two, other)]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["model.embed_tokens.weight"], made[2]["model.embed_tokens.weight"])


def test_a_text_is_cut_into_rows_that_give_it_again_and_only_its_end_is_an_end(tokenizer):
    text = "First.\n\nSecond <|im_end|> one.\n \n" + "".join(map(str, range(50))) + "\n\nLast."
    filler = "".join(f"\n\nNumber {n} of many lines." for n in range(20))
    cut = encode_text(text + filler, tokenizer, max_tokens=40, report=(report := Report()))
    ids = [i for row in cut for i in row.row.ids]
    assert tokenizer.decode(ids) == text + filler + "<|im_end|>"
    assert ids.count(2) == 1
    assert all(len(row.row.ids) <= 40 and all(row.row.supervised) for row in cut)
    assert report.used == len(cut) >= 10
    assert [row.line for row in cut][:3] == [1, 5, 5]


def test_a_single_token_that_is_left_of_a_paragraph_is_no_row(tokenizer):
    text = "".join(f"{n:03}{'x' * 36}\n\n{n:03}{'y' * 50}\n\n" for n in range(24))  # 41 tokens, then more than fit
    cut = encode_text(text, tokenizer, max_tokens=40, report=(report := Report()))
    assert min(len(row.row.ids) for row in cut) > 1
    assert report.rows == report.used + report.duplicates


def test_activations_may_be_computed_twice_and_nothing_changes(make_job):
    results = []
    for choice in ("off", "on"):
        folder = make_job(choice, checkpointing=choice)
        go(folder)
        results.append((folder / "out" / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_activations_are_computed_twice_where_memory_is_short(tiny_folder, monkeypatch):
    model = load_plain(tiny_folder)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    assert not memory.checkpoints_activations("auto", model, CPU, 384)
    assert memory.checkpoints_activations("auto", model, CPU, 2**20)
    assert memory.checkpoints_activations("on", model, CPU, 1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert not memory.checkpoints_activations("auto", model, CPU, 2**20)


def test_a_step_without_memory_is_taken_again_with_activations_computed_twice(make_job, monkeypatch):
    plain, short = make_job("plain"), make_job("short")
    go(plain)
    forward, made, spared = Scorer.forward, [], []
    spare = loop.checkpoint_activations

    def once(self, batch):
        if self.training and not spared:
            made.append(len(made))
            if len(made) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "forward", once)
        patch.setattr(loop, "checkpoint_activations", lambda model: spared.append(spare(model)))
        assert go(short).of(Done)
    assert len(made) == 4
    adapters = [(one / "out" / "adapter_model.safetensors").read_bytes() for one in (plain, short)]
    assert adapters[0] == adapters[1]

    def never(self, batch):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(Scorer, "forward", never)
    with pytest.raises(JobError, match=r"not enough memory on cpu; lower finetune.max_tokens") as caught:
        go(make_job("none"))
    assert caught.value.fields["fault"] == "settings"


def test_a_check_finds_its_way_where_memory_is_short_as_the_job_will(make_job, monkeypatch):
    forward, spared = Scorer.forward, []
    spare = loop.checkpoint_activations

    def short(self, batch):
        if self.training and not spared:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(Scorer, "forward", short)
    monkeypatch.setattr(loop, "checkpoint_activations", lambda model: spared.append(spare(model)))
    folder, heard = make_job(), Heard()
    check(folder, Spec.read(folder), heard, threading.Event())
    assert heard.of(Estimated)[0].seconds > 0
    assert len(spared) == 1


def test_four_bits_are_refused_without_cuda_and_the_way_out_is_named(make_job):
    with pytest.raises(JobError, match=r'needs a CUDA device.*set finetune.quantization="none"') as caught:
        go(make_job(quantization="4bit"))
    assert caught.value.fields["fault"] == "settings"


def test_a_base_whose_layers_multiply_by_themselves_gets_the_same_delta(tiny_folder):
    """As bitsandbytes' layers do: the weight is no matrix that we could use."""
    from finetune.modeling import lora

    class Linear4bit(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    model, twin, batch = load_plain(tiny_folder), load_plain(tiny_folder), collate(rows(), CPU)
    for module in model.modules():
        if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
            module.__class__ = Linear4bit
    for one in (model, twin):
        torch.manual_seed(0)
        assert len(lora.add_lora(one, rank=4, alpha=8, dropout=0.2)) == 7
        for _, layer in lora.lora_layers(one):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        one.train()
        torch.manual_seed(1)
        Scorer(one)(batch).backward()
        one.gradients = [parameter.grad for parameter in lora.trainable(one)]
    torch.testing.assert_close(model.gradients, twin.gradients, atol=1e-4, rtol=1e-4)


def finetune(*words):
    return subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_owner_makes_a_job_from_the_command_line(tmp_path, tiny_folder):
    (tmp_path / "faq.jsonl").write_bytes(faq(40))
    job = tmp_path / "job"
    command = ["new", job, "--model", tiny_folder, "--data", tmp_path / "faq.jsonl", "--method", "full"]
    made = finetune(*command, "epochs=1", "preset=card", "dropout=auto", "rslora=true")
    assert f"python -m finetune train {job}" in made.stdout
    spec = Spec.read(job)
    assert (spec.method, spec.hyper.epochs, spec.hyper.learning_rate) == ("full", 1, 1e-4)
    assert (spec.hyper.dropout, spec.hyper.rslora, spec.label) == (None, True, "job")
    again = finetune(*command)
    assert again.returncode == 1
    assert "is a job already" in again.stderr


def test_what_is_wrong_with_a_command_is_named(tmp_path, tiny_folder, capsys):
    from finetune.__main__ import main

    (tmp_path / "faq.jsonl").write_bytes(faq(40))
    command = ["new", str(tmp_path / "job"), "--model", str(tiny_folder), "--data", str(tmp_path / "faq.jsonl")]
    for words, message in (
        (["epoch=1"], "the keys are "),
        (["epochs=many"], "epochs = many does not work: it must be a whole number from 1 to 1000"),
        (["--model", "nowhere"], "nowhere is not the folder of a model"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--method", "scratch", "hidden=50", "heads=4"], "fresh.hidden=50 must be"),
        (
            ["--method", "scratch", "vocabulary=100"],
            "fresh.vocabulary = 100 does not work: it must be a whole number from 259",
        ),
        (["rank=0"], "rank = 0 does not work"),
        (["preset=thorogh"], "one of auto, card, thorough (did you mean thorough?)"),
        (["quantization=8bit"], "quantization = "),
        (["layers=99"], "leave it out, or add --method scratch"),
        (["--device", "gpu"], "device = gpu does not work: it must look like cpu, cuda or cuda:N"),
    ):
        assert main([*command, *words]) == 1
        assert message in capsys.readouterr().err, words
        assert not (tmp_path / "job").exists()


def test_a_job_folder_that_cannot_be_made_is_named(tmp_path, tiny_folder, capsys):
    from finetune.__main__ import main

    (tmp_path / "faq.jsonl").write_bytes(faq(40))
    command = ["--model", str(tiny_folder), "--data", str(tmp_path / "faq.jsonl")]
    for job in (tmp_path / "faq.jsonl", tmp_path / "faq.jsonl" / "job"):
        assert main(["new", str(job), *command]) == 1
        assert f"{job} cannot be made: " in capsys.readouterr().err
    (tmp_path / "data.jsonl").write_bytes(faq(40))
    assert main(["new", str(tmp_path), "--model", str(tiny_folder), "--data", str(tmp_path / "data.jsonl")]) == 1
    assert "are the same file; name another folder" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(make_job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(JobError, match=r"no device cuda:1 on this machine \(CUDA devices: 1\)") as caught:
        go(of(make_job(), device="cuda:1"))
    assert caught.value.fields["fault"] == "settings"
