"""An adapter from elsewhere goes through the same reader and the same gate, and comes out byte for byte."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from core.adapters import folders
from core.errors import JobError
from core.jobs.protocol import SHOWN, Done, Evaluated, Judged, Shown, Spec
from finetune.evaluation.evaluator import SCORES
from finetune.imported import judge_imported
from finetune.training.checkpoints import Interrupted
from finetune.training.train import train
from tests.finetune.conftest import Heard, MakeJob
from tests.support.tiny import save_adapter


def examine(job: Path, candidate: Path, **changes: object) -> Heard:
    shutil.copytree(candidate, job / "candidate")
    heard = Heard()
    spec = replace(Spec.read(job), candidate="candidate", **changes)  # type: ignore[arg-type]
    judge_imported(job, spec, heard, threading.Event())
    return heard


def test_our_own_adapter_brought_back_is_judged_as_it_was_when_it_was_trained(make_job: MakeJob) -> None:
    first, second = make_job("first"), make_job("second")
    heard = Heard()
    train(first, Spec.read(first), heard, threading.Event())
    (trained,) = heard.of(Judged)
    (again,) = examine(second, first / "out").of(Judged)
    assert again.loss == pytest.approx(trained.loss, rel=1e-4)
    assert again.lift == pytest.approx(trained.lift, rel=1e-3, abs=1e-4)
    assert (again.verdict, again.rows, again.champion) == (trained.verdict, trained.rows, trained.champion)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=["q and v", "rslora", "patterns"],
)
def test_peft_folders_of_any_plain_kind_are_examined_and_published(
    make_job: MakeJob, tiny_folder: Path, tmp_path: Path, config: dict[str, object]
) -> None:
    made = save_adapter(tiny_folder, tmp_path / "theirs", seed=1, std=0.05, **config).folder
    job = make_job()
    heard = examine(job, made)
    out = job / "out"
    assert folders.inspect(out).base_fingerprint
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["imported"] is True
    assert manifest["hyper"]["rank"] == config["r"]
    (judged,), (done,) = heard.of(Judged), heard.of(Done)
    assert done.steps == 0
    assert done.test_loss == judged.loss
    assert [event.who for event in heard.of(Evaluated)] == ["candidate", "base"]
    scores = json.loads((job / SCORES).read_text())
    assert len(scores["tokens"]) == judged.rows
    shown = Shown.load((job / SHOWN).read_text())
    assert shown.unseen[0][0].startswith("What is ")
    assert {one[0] for one in shown.worst} <= set(scores["lines"])
    again = Heard()
    judge_imported(job, Spec.read(job), again, threading.Event())  # it was killed between rename and last word
    assert [type(event) for event in again] == [Judged, Done]


def test_what_cannot_be_served_is_not_published_and_named(make_job: MakeJob, tiny_folder: Path, tmp_path: Path) -> None:
    made = save_adapter(tiny_folder, tmp_path / "theirs", seed=1, std=0.05, r=4).folder
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    job = make_job()
    with pytest.raises(JobError, match="the adapter cannot be used: use_dora=True is not supported") as caught:
        examine(job, made)
    assert caught.value.fields["fault"] == "settings"
    assert str(tmp_path) not in caught.value.detail
    assert not (job / "out").exists()


def test_an_adapter_of_another_model_is_named(make_job: MakeJob, tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made = save_adapter(tiny_folder, tmp_path / "theirs", seed=1, std=0.05, r=4).folder
    path = made / "adapter_model.safetensors"
    save_file({name: part[..., :-1].contiguous() for name, part in load_file(path).items()}, path)
    with pytest.raises(JobError, match="has the shape"):
        examine(make_job(), made)


def test_it_stops_when_it_is_told_to(make_job: MakeJob, tiny_folder: Path, tmp_path: Path) -> None:
    made = save_adapter(tiny_folder, tmp_path / "theirs", seed=1, std=0.05, r=4).folder
    job = make_job()
    shutil.copytree(made, job / "candidate")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        judge_imported(job, replace(Spec.read(job), candidate="candidate"), Heard(), stop)
    assert not (job / "out").exists()


def test_a_job_without_a_candidate_says_so(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(JobError, match="names no candidate"):
        judge_imported(job, Spec.read(job), Heard(), threading.Event())
