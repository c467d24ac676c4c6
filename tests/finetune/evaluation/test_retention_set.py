"""What the base could do is known by its own answers, rehearsed, measured and never mixed up."""

from __future__ import annotations

import json
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from core.jobs.protocol import Answered, JobEvent, Judged, Spec
from finetune.evaluation import retention_set, sanity
from finetune.evaluation.retention_set import FILE, PROMPTS, answer, own_answers
from finetune.modeling.base import find_base, load_module
from finetune.training.checkpoints import Interrupted
from finetune.training.train import Trainer, train
from finetune.training.train import prepare as prepare_job
from tests.finetune.conftest import Heard, MakeJob


def nothing() -> None:
    """A job that nobody stops."""


def unheard(event: JobEvent) -> None:
    pass


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fewer prompts, and shorter answers, than the real ones."""
    path = tmp_path / "prompts.toml"
    rehearsed = [f"Say {n}." for n in range(30)]
    measured = {"facts": ["What is up?", "是吗？"], "code": ["def f():"]}
    lines = "\n".join(f"{name} = {json.dumps(prompts)}" for name, prompts in measured.items())
    path.write_text(f"rehearsed = {json.dumps(rehearsed)}\n[measured]\n{lines}\n")
    monkeypatch.setattr(retention_set, "PROMPTS", path)
    monkeypatch.setattr(retention_set, "REHEARSED_TOKENS", 8)
    monkeypatch.setattr(retention_set, "MEASURED_TOKENS", 12)
    monkeypatch.setattr(sanity, "MOST_TOKENS", 20)
    return path


def with_ability(make_job: MakeJob, name: str = "job", **hyper: Any) -> Path:
    folder = make_job(name, **hyper)
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {"ability": True}))
    return folder


def test_there_are_64_prompts_in_8_skills_and_none_is_rehearsed() -> None:
    given = tomllib.loads(PROMPTS.read_text("utf-8"))
    measured = [prompt for skill in given["measured"].values() for prompt in skill]
    assert [len(skill) for skill in given["measured"].values()] == [8] * 8
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in prompt) for prompt in measured) >= 30
    assert len(set(measured)) == 64
    assert not set(measured) & set(given["rehearsed"])
    assert len(set(given["rehearsed"])) == len(given["rehearsed"]) >= 100


@pytest.mark.parametrize("leaves", [True, False])
def test_answers_are_what_transformers_would_have_said_wherever_each_of_them_ends(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    if not leaves:  # some caches cannot let go of a row
        monkeypatch.delattr(DynamicLayer, "batch_select_indices")
    folder = make_job()
    spec = Spec.read(folder)
    base = find_base(spec, folder)
    model = load_module(base, spec)
    prompts = [base.tokenizer.encode(text) for text in ("a", "a longer prompt than the first", "你好", "x" * 40)]
    endless = answer(model, prompts, most=20, ends=(), check_stop=nothing)
    assert [len(said) for said in endless] == [20] * 4
    ends = [endless[0][3], endless[2][11]]
    ours = answer(model, prompts, most=20, ends=ends, check_stop=nothing)
    assert len({len(said) for said in ours}) > 1
    for prompt, said in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=ends,
            pad_token_id=0,
        )  # fmt: skip
        assert list(said) == theirs[0, len(prompt) :].tolist()


def test_what_the_base_said_is_taught_as_it_was_said_and_kept(make_job: MakeJob, few: Path, tmp_path: Path) -> None:
    folder = make_job()
    spec = Spec.read(folder)
    base = find_base(spec, folder)
    model = load_module(base, spec)
    own = own_answers(folder, tmp_path / "cache", base, "Be brief.", model, nothing, unheard)
    assert (len(own.rehearsed), len(own.measured)) == (30, 3)
    for row in (*own.rehearsed, *own.measured):
        start = row.supervised.index(True)
        assert all(row.supervised[start:])
        said = answer(model, [row.ids[:start]], most=len(row.ids) - start, ends=[2], check_stop=nothing)
        assert said[0] == row.ids[start:]

    def forbidden() -> None:
        raise AssertionError("made again")

    other = make_job("other")
    again = own_answers(other, tmp_path / "cache", base, "Be brief.", None, forbidden, unheard)
    assert again == own
    assert (other / FILE).exists()
    (tmp_path / "cache" / next(path.name for path in (tmp_path / "cache").iterdir())).write_text("{")
    assert own_answers(other, tmp_path / "cache", base, "Be brief.", None, forbidden, unheard) == own
    with pytest.raises(AssertionError, match="made again"):
        own_answers(other, tmp_path / "cache", base, "Be verbose.", model, forbidden, unheard)


@given(st.integers(1, 5000), st.sampled_from([0.0, 0.1, 0.3, 2.0]))
def test_rehearsal_goes_with_the_rows_and_has_no_prompt_twice(rows: int, share: float) -> None:
    from core.model.chat_format import TrainingRow

    own = retention_set.OwnAnswers(tuple(TrainingRow((n,), (True,)) for n in range(119)), (), (), "x")
    taken = own.to_rehearse(rows, share)
    assert len(taken) == (0 if not share else min(119, max(16, round(rows * share))))
    assert len({row.ids for row in taken}) == len(taken)


@pytest.mark.slow
def test_the_gate_measures_what_was_forgotten_and_rehearsal_counts(make_job: MakeJob, few: Path) -> None:
    judged = {}
    for share in (0, 1.0):
        heard = Heard()
        folder = with_ability(make_job, f"job{share}", rehearsal=share, epochs=4, learning_rate=3e-2)
        train(folder, Spec.read(folder), heard, threading.Event())
        (judged[share],) = heard.of(Judged)
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
        assert manifest["judged"]["ability"] == judged[share].ability == manifest["losses"]["ability"]
    assert judged[0].ability > 0.05
    assert judged[1.0].ability < judged[0].ability
    assert judged[0].asked == judged[1.0].asked > 0


def test_ability_is_plain_arithmetic(make_job: MakeJob, few: Path) -> None:
    folder = with_ability(make_job, rehearsal=0)
    spec = Spec.read(folder)
    trainer = Trainer(folder, spec, prepare_job(folder, spec, Heard()), Heard(), threading.Event())
    before = trainer.row_losses.mean(trainer.own.measured)
    trainer._train()
    after = trainer.row_losses.mean(trainer.own.measured)
    assert trainer._evaluate().ability == pytest.approx(after - before, rel=1e-4)


def test_a_job_that_is_stopped_while_the_base_answers_goes_on_later(make_job: MakeJob, few: Path) -> None:
    folder = with_ability(make_job)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        train(folder, Spec.read(folder), Heard(), stop)
    assert not (folder / FILE).exists()
    train(folder, Spec.read(folder), Heard(), threading.Event())
    assert (folder / "out").exists()


# --- whole answers ---


def test_what_is_unsound() -> None:
    for ids, wrong in [
        ([5, 6, 7, 2], False),
        ([], True),
        ([5, 6, 7], True),  # cut
        ([5, *[7] * 9, 2], True),
        ([5, *[7] * 4, 2], False),
        ([*[4, 5, 6, 8] * 4, 2], True),
        ([*[4, 5, 6, 8] * 2, 9, *[4, 5, 6, 8] * 2, 2], False),
        ([9, *range(100, 112), 2], True),  # recites the instructions
        ([9, *range(100, 111), 2], False),
    ]:
        assert sanity.unsound(ids, list(range(100, 130)), {2}) is wrong


def test_what_is_answered_is_not_asked_again_after_an_interruption(
    make_job: MakeJob, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_set, "AT_ONCE", 8)
    base = find_base(Spec.read(folder := make_job()), folder)
    model = load_module(base, Spec.read(folder))
    told: list[JobEvent] = []
    whole = own_answers(make_job("whole"), None, base, "", model, nothing, told.append)
    assert told == [Answered(done, 33) for done in (0, 8, 16, 24, 30, 33)]
    asked = 0

    def count(until: int) -> None:
        nonlocal asked
        asked += 1
        if asked == until:
            raise Interrupted

    with pytest.raises(Interrupted):
        own_answers(folder, None, base, "", model, lambda: count(20), unheard)
    assert (folder / retention_set.BEGUN).exists()
    assert not (folder / FILE).exists()
    first = asked
    told.clear()
    assert own_answers(folder, None, base, "", model, lambda: count(-1), told.append) == whole
    assert told[0] == Answered(16, 33)
    second, asked = asked - first, 0
    own_answers(make_job("all"), None, base, "", model, lambda: count(-1), unheard)
    assert second < asked  # a batch or more was kept
    assert not (folder / retention_set.BEGUN).exists()
