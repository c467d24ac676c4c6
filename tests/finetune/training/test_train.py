"""A job from spec to adapter on a tiny model: what it says, what it leaves, and that it goes on with the same bits."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.engine.lora.adapter_files import AdapterTarget, load_adapter
from core.errors import BadDataset, JobError
from core.jobs.protocol import FEWEST_TEST_ROWS, Checked, Done, Evaluated, Judged, Planned, Progress, Spec, Warned
from core.model.weights import fingerprint
from core.types import AdapterRef
from finetune.data.split import split
from finetune.evaluation.row_losses import RowLosses
from finetune.training import checkpoints
from finetune.training import train as loop
from finetune.training.checkpoint import BEST, NEWEST
from finetune.training.checkpoints import Interrupted
from finetune.training.train import Trainer, Unstable, train
from tests.finetune.conftest import Heard, faq
from tests.support.tiny import quietly

pytestmark = pytest.mark.slow


def go(folder, stop=None, **changes):
    heard = Heard()
    spec = replace(Spec.read(folder), **changes)
    train(folder, spec, heard, stop or threading.Event())
    return heard


def stop_after(monkeypatch, steps):
    """Set the stop while step number `steps` + 1 is under way."""
    stop = threading.Event()
    take = Trainer.take_step

    def counted(self):
        if self.position.step == steps:
            stop.set()
        return take(self)

    monkeypatch.setattr(Trainer, "take_step", counted)
    return stop


def test_a_job_tells_what_it_does_and_leaves_an_adapter(make_job):
    folder = make_job()
    heard = go(folder)
    (checked,) = heard.of(Checked)
    assert (checked.rows, checked.used) == (60, 60)
    assert checked.train + checked.validation + checked.test == 60
    assert 0 < checked.median_tokens <= checked.longest_tokens <= checked.tokens
    assert checked.missing >= FEWEST_TEST_ROWS - checked.test
    (planned,) = heard.of(Planned)
    last = heard.of(Progress)[-1]
    assert (planned.steps, planned.rows, planned.rehearsed) == (last.steps, checked.train, 0)
    assert 0 < planned.tokens < 2 * checked.tokens
    assert last.step == last.steps
    assert last.epoch == last.epochs == 2
    assert last.tokens_per_s > 0
    assert [(e.split, e.who) for e in heard.of(Evaluated)] == [
        ("validation", "candidate"),
        ("validation", "candidate"),
        ("test", "candidate"),
        ("test", "base"),
    ]
    (done,) = heard.of(Done)
    assert heard[-1] is done
    assert done.train_loss_last < done.train_loss_first
    assert done.test_loss is not None
    assert done.test_loss_base is not None
    assert done.test_loss < done.test_loss_base - 0.3
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert not (folder / "out.new").exists()


def test_the_manifest_says_where_it_came_from_and_nothing_it_read(make_job, tiny_folder):
    folder = make_job()
    go(folder, model_name="Tiny-1B")
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["label"] == "terminal@1"
    assert manifest["base_fingerprint"] == fingerprint(tiny_folder)
    assert manifest["base_model"] == "Tiny-1B"
    assert manifest["data_sha256"] == Spec.read(folder).data_sha256
    assert manifest["hyper"]["rank"] == 4
    assert manifest["dropout"] == 0.1
    assert sum(manifest["rows"][part] for part in ("train", "validation", "test")) == 60
    card = (folder / "out" / "README.md").read_text()
    for name in ("base_fingerprint", "template_sha256", "instructions_sha256", "data_sha256"):
        assert manifest[name] in card, name
    for path in (folder / "out").iterdir():
        content = path.read_bytes()
        for word in (b"What is", b"Be brief", str(tiny_folder).encode(), str(folder).encode()):
            assert word not in content, (path.name, word)


def test_peft_and_the_engine_load_it_and_it_is_what_was_trained(make_job, tiny_folder, monkeypatch):
    from peft import PeftModel

    trained = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: trained.append(self) or run(self))
    folder = make_job()
    go(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    shapes = {n: tuple(m.weight.shape) for n, m in base.named_modules() if n.endswith("_proj")}
    twin = quietly(lambda: PeftModel.from_pretrained(base, folder / "out")).eval()
    ids = torch.arange(40)[None]
    ours = trained[0].model.eval()(ids).logits
    torch.testing.assert_close(twin(ids).logits, ours, atol=1e-5, rtol=1e-5)
    with twin.disable_adapter():
        assert (twin(ids).logits - ours).abs().max() > 0.1
    weights = load_adapter(AdapterRef("x", folder / "out"), AdapterTarget(fingerprint(tiny_folder), shapes))
    assert weights.rank == 4
    assert len(weights.pairs) == 14


@pytest.mark.parametrize("cut", [0, 3, 5])
def test_a_job_that_was_cut_ends_with_the_same_bits(make_job, monkeypatch, cut):
    """Steps and all cut at `cut`, mid-epoch and at an epoch's end: adapter and moments equal an uncut run's."""
    whole, parts = make_job("whole"), make_job("parts")
    go(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        go(parts, stop_after(patch, cut))
    assert not (parts / "out").exists()
    heard = go(parts)
    assert heard.of(Progress)[0].step == cut + 1
    for name in (NEWEST, BEST):
        one, other = (load_file(folder / "checkpoint" / name) for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert any(name.endswith("exp_avg_sq") for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "out/adapter_model.safetensors").read_bytes() == (
        parts / "out/adapter_model.safetensors"
    ).read_bytes()


def test_a_stop_is_noticed_within_one_micro_batch(make_job, monkeypatch):
    stop, seen = threading.Event(), []
    real = RowLosses.batch

    def batch(self, rows):
        seen.append(len(rows))
        if len(seen) == 5:
            stop.set()
        return real(self, rows)

    monkeypatch.setattr(RowLosses, "batch", batch)
    with pytest.raises(Interrupted):
        go(make_job(), stop)
    assert len(seen) == 5


def test_a_prefix_that_all_rows_share_is_packed_and_the_losses_are_the_same(make_job, monkeypatch):
    """Without dropout, so that both ways compute the same."""
    packed = go(make_job("packed", dropout=0.0)).of(Done)[0]
    monkeypatch.setattr(Trainer, "_shared_prefix", lambda self: 0)
    padded = go(make_job("padded", dropout=0.0)).of(Done)[0]
    assert packed.test_loss_base == pytest.approx(padded.test_loss_base, rel=1e-4)
    assert packed.test_loss == pytest.approx(padded.test_loss, rel=0.05)  # other micro-batches, other rows together


def test_where_packing_is_not_exact_rows_are_padded(make_job, monkeypatch):
    monkeypatch.setattr(loop, "pack", lambda rows, device, prefix: loop.collate(rows[:1], device))
    assert go(make_job()).of(Done)


def test_an_out_that_is_there_is_told_and_not_made_again(make_job, monkeypatch):
    """The trainer was killed between the rename and its last word."""
    folder = make_job()
    first = go(folder)
    monkeypatch.setattr(loop, "prepare", None)
    judged, again = go(folder)
    assert judged in first
    assert replace(again, seconds=0.0) == replace(first[-1], seconds=0.0)


def test_a_checkpoint_that_was_trained_on_rows_that_test_now_is_not_gone_on_from(make_job, monkeypatch):
    """As when another version of this program splits a set otherwise."""
    folder = make_job()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        go(folder, stop_after(patch, 3))

    def otherwise(keys):
        parts = split(keys)
        return replace(parts, train=parts.test + parts.train[3:], test=parts.train[:3])

    monkeypatch.setattr("finetune.prepare.split", otherwise)
    heard = go(folder)
    assert "starts again" in heard.of(Warned)[0].text


def test_a_damaged_checkpoint_or_one_of_other_settings_begins_anew(make_job, monkeypatch):
    folder = make_job()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        go(folder, stop_after(patch, 3))
    path = folder / "checkpoint" / NEWEST
    path.write_bytes(path.read_bytes()[:100])
    heard = go(folder)
    assert "starts again" in heard.of(Warned)[0].text
    assert heard.of(Progress)[0].step == 1


def test_a_value_that_is_not_finite_goes_back_once_with_half_the_rate(make_job, monkeypatch):
    take, thrown, rates = Trainer.take_step, [], []

    def failing(self):
        if self.position.step == 4 and not thrown:
            thrown.append(True)
            raise Unstable("non_finite", at=5)
        taken = take(self)
        rates.append(self.position.rate_factor)
        return taken

    monkeypatch.setattr(Trainer, "take_step", failing)
    heard = go(make_job())
    (warned,) = heard.of(Warned)
    assert "half the learning rate" in warned.text
    assert set(rates[:4]) == {1.0}
    assert set(rates[4:]) == {0.5}
    assert len(rates) == 4 + heard.of(Done)[0].steps  # from the start, where the best is that was measured
    assert heard.of(Done)


def test_the_second_value_that_is_not_finite_ends_the_job(make_job, monkeypatch):
    monkeypatch.setattr(
        loop.Scorer, "forward", lambda self, batch: self.model.model.layers[0].mlp.up_proj.lora_A.sum() * math.nan
    )
    folder = make_job()
    heard = Heard()
    with pytest.raises(JobError, match="also at half the learning rate") as caught:
        train(folder, Spec.read(folder), heard, threading.Event())
    assert caught.value.fields["fault"] == "settings"
    assert len(heard.of(Warned)) == 1
    assert not (folder / "out").exists()


def test_an_infinite_gradient_is_seen_though_clipping_would_hide_it(make_job, monkeypatch):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum() * 0

        @staticmethod
        def backward(ctx, grad):
            return torch.full((4, 32), math.inf)

    def forward(self, batch):
        return Steep.apply(self.model.model.layers[0].mlp.up_proj.lora_A)

    monkeypatch.setattr(loop.Scorer, "forward", forward)
    with pytest.raises(JobError, match="not finite"):
        go(make_job())


def test_a_learning_rate_of_one_stops_restores_and_tells(make_job, taught_folder):
    """Nothing is made of weights that are lost; the way out is named."""
    folder = make_job(base=taught_folder, learning_rate=1.0, epochs=8)
    heard = Heard()
    with pytest.raises(JobError, match=r"finetune.learning_rate = 0.001") as caught:
        train(folder, Spec.read(folder), heard, threading.Event())
    assert caught.value.fields["fault"] == "settings"
    (warned,) = heard.of(Warned)
    assert "going on from step 0 with half the learning rate, 0.5" in warned.text
    assert not (folder / "out").exists()
    kept = load_file(folder / "checkpoint" / NEWEST)
    assert all(not tensor.any() for name, tensor in kept.items() if "lora_B" in name)


def test_a_job_that_has_lost_its_way_goes_back_to_its_best_whenever_checkpoints_were_written(make_job, monkeypatch):
    """The third round goes astray once; what comes of it does not depend on the clock."""
    take = Trainer.take_step

    def astray(self):
        if self.position.rate_factor == 1 and self.position.step >= 2 * self.schedule.steps_per_epoch:
            for parameter in self.parameters:
                parameter.data.fill_(math.nan)
        return take(self)

    monkeypatch.setattr(Trainer, "take_step", astray)
    results = []
    for often in (0.0, 1000.0):
        monkeypatch.setattr(checkpoints, "CHECKPOINT_S", often)
        folder = make_job(f"every-{often:g}", epochs=4)
        heard = go(folder)
        (warned,) = heard.of(Warned)
        assert "going on from step 10 " in warned.text
        results.append((folder / "out" / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_it_stops_when_nothing_is_gained_and_the_best_is_what_is_published(make_job, monkeypatch):
    """Validation losses as they might be: best after the second round, two rounds without a gain."""
    made = iter([3.0, 2.0, 1.5, 1.6, 1.7, 1.8])
    mean = RowLosses.mean
    monkeypatch.setattr(RowLosses, "mean", lambda self, rows: mean(self, rows) * 0 + next(made))
    states = {}
    validate = Trainer._validate

    def kept(self):
        validate(self)
        states[self.position.step] = {name: tensor.clone() for name, tensor in self.trained.tensors().items()}

    monkeypatch.setattr(Trainer, "_validate", kept)
    folder = make_job(epochs=10)
    heard = go(folder)
    assert list(states) == [0, 5, 10, 15, 20]
    assert "stopped after 20 of 50 steps" in heard.of(Warned)[0].text
    assert (heard.of(Progress)[-1].step, heard.of(Progress)[-1].steps) == (20, 20)
    out = load_file(folder / "out" / "adapter_model.safetensors")
    assert all(torch.equal(out[name], tensor) for name, tensor in states[10].items())
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["losses"]["validation_10"] == 1.5
    assert (manifest["epochs_done"], manifest["hyper"]["epochs"]) == (4.0, 10)
    assert "for 4 of 10 epochs (20 steps" in (folder / "out" / "README.md").read_text()


def test_without_patience_all_steps_are_taken(make_job, monkeypatch):
    made = iter([1.0, 1.1, 1.2, 1.3, 1.4, 1.45])
    monkeypatch.setattr(RowLosses, "mean", lambda self, rows: next(made))
    heard = go(make_job(epochs=5, patience=0))
    assert heard.of(Done)[0].steps == 25
    assert not heard.of(Warned)


def test_a_long_epoch_is_looked_at_more_often(make_job, monkeypatch):
    monkeypatch.setattr("finetune.training.schedule.EVALUATE_STEPS", 2)
    assert [e.step for e in go(make_job()).of(Evaluated)[:-2]] == [2, 4, 5, 7, 9, 10]


def test_an_rslora_adapter_is_scaled_by_the_root_of_its_rank_also_for_peft(make_job, tiny_folder, monkeypatch):
    from peft import PeftModel

    trained = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: trained.append(self) or run(self))
    folder = make_job(rslora=True)
    go(folder)
    twin = quietly(lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder / "out"))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(twin.eval()(ids).logits, trained[0].model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


def test_another_base_model_is_ours_to_answer_for(make_job):
    with pytest.raises(JobError, match="but the job is for abcdef") as caught:
        go(make_job(), fingerprint="abcdef")
    assert "fault" not in caught.value.fields


def test_another_data_file_is_refused(make_job):
    folder = make_job()
    (folder / "data.jsonl").write_bytes(faq(61))
    with pytest.raises(JobError, match="but the job is for"):
        go(folder)


def test_bad_data_names_its_line(make_job):
    with pytest.raises(BadDataset) as caught:
        go(make_job(data=b'{"q": 1}\n' * 20))
    assert caught.value.fields["line"] == 1


def test_a_setting_is_refused_in_the_language_of_the_job(make_job):
    with pytest.raises(JobError, match=r"finetune.rank = 0 .* from 1 to 256") as caught:
        go(make_job(rank=0), language="zh")
    assert "finetune.rank = 0" in caught.value.fields["reason"].render("zh")


def test_a_setting_out_of_range_is_named(make_job):
    settings = {"rank": 0, "dropout": 1.0, "learning_rate": math.nan, "epochs": 0}
    for setting, value in settings.items():
        with pytest.raises(JobError, match=f"finetune.{setting} = ") as caught:
            go(make_job(setting, **{setting: value}))
        assert caught.value.fields["fault"] == "settings"
    with pytest.raises(JobError, match=r"hyper\.schedule"):
        go(make_job("schedule", schedule="linear"))


def test_a_candidate_is_judged_against_the_version_that_answers_now(make_job):
    first = make_job("first", epochs=1)
    (before,) = go(first).of(Judged)
    second = make_job("second", rank=8, seed=1)  # of another rank than the champion
    heard = go(second, champion=str(first / "out"), champion_label="terminal@1")
    (judged,) = heard.of(Judged)
    assert (before.champion, judged.champion) == ("base", "terminal@1")
    assert judged.loss_champion == pytest.approx(before.loss, rel=1e-5)
    assert judged.lift_champion == pytest.approx(before.lift, rel=1e-3, abs=1e-5)
    assert judged.loss == pytest.approx(heard.of(Done)[0].test_loss)
    assert judged.rows == heard.of(Checked)[0].test
    assert judged.verdict == "too_few"
    assert json.loads((second / "out" / "manifest.json").read_text())["judged"]["champion"] == "terminal@1"


def test_a_champion_that_cannot_be_read_is_told_and_base_stands_in(make_job):
    folder = make_job()
    heard = go(folder, champion="nowhere", champion_label="terminal@9")
    assert heard.of(Judged)[0].champion == "base"
    assert any("terminal@9" in warned.text for warned in heard.of(Warned))


def test_losses_of_rows_are_those_of_the_rows_alone_and_a_swapped_row_teaches_the_same_tokens(make_job):
    folder = make_job()
    spec = Spec.read(folder)
    trainer = Trainer(folder, spec, loop.prepare(folder, spec, Heard()), Heard(), threading.Event())
    numbers = trainer.prepared.split.test
    own, other = trainer.prepared.part(numbers), trainer.prepared.swapped(numbers)
    together = trainer.row_losses.of(own)
    alone = [trainer.row_losses.of([row])[0] for row in own]
    assert together == pytest.approx(alone, rel=1e-4)
    for one, two in zip(own, other, strict=True):
        taught = [i for i, said in zip(one.ids, one.supervised, strict=True) if said]
        assert taught == [i for i, said in zip(two.ids, two.supervised, strict=True) if said]
        assert one.ids != two.ids
