"""What a check shows of the rows and counts of the job: held to what the job itself does."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from core.jobs.protocol import PREVIEW, Checked, Estimated, Fresh, Planned, Preview, Spec
from finetune.check import as_trained, check, to_show
from finetune.prepare import histogram, prepare
from finetune.training.train import Trainer
from tests.finetune.conftest import Heard, MakeJob, faq


def checked(folder: Path, spec: Spec) -> Heard:
    heard = Heard()
    check(folder, spec, heard, threading.Event())
    return heard


def test_the_preview_is_the_very_tokens_and_marks_what_is_learned(make_job: MakeJob) -> None:
    folder = make_job()
    spec = replace(Spec.read(folder), warm_up=False)
    checked(folder, spec)
    shown = Preview.load((folder / PREVIEW).read_text("utf-8"))
    prepared = prepare(folder, spec, Heard())
    rows = {row.line: row for row in prepared.encoded}
    longest = max(prepared.encoded[1:], key=lambda row: len(row.row.ids))
    assert shown[0].line == 1
    assert any(len(rows[one.line].row.ids) == len(longest.row.ids) for one in shown)
    assert [one.line for one in shown] == sorted({one.line for one in shown})
    for one in shown:
        row, tokenizer = rows[one.line], prepared.base.tokenizer
        assert "".join(text for _, text in one.parts) == tokenizer.decode(list(row.row.ids))
        assert [text for taught, text in one.parts if taught] == [f"{one.answer}<|im_end|>"]
        assert "Be brief." in one.parts[0][1]
        assert one.question in one.parts[0][1]


@pytest.mark.parametrize("known", [1, 2, 3, 4])
def test_of_few_rows_each_is_shown_once(make_job: MakeJob, known: int) -> None:
    folder = make_job()
    prepared = prepare(folder, Spec.read(folder), Heard())
    shown = to_show(prepared.encoded[:known])
    assert [row.line for row in shown] == sorted({row.line for row in shown})
    assert len(shown) == min(3, known)
    assert as_trained(shown[0], prepared.base).line == 1


@pytest.mark.parametrize("rehearsal", [0.0, 0.25])
def test_it_counts_what_the_job_will_do(make_job: MakeJob, rehearsal: float) -> None:
    folder = make_job(data=faq(100), epochs=3, rehearsal=rehearsal)
    spec = replace(Spec.read(folder), warm_up=False)
    estimated = checked(folder, spec).of(Estimated)[0]
    assert (estimated.seconds, estimated.memory_mib) == (0, 0)
    heard = Heard()
    Trainer(folder, spec, prepare(folder, spec, Heard()), heard, threading.Event()).progress.emit_plan()
    (planned,) = heard.of(Planned)
    assert (estimated.rows, estimated.rehearsed, estimated.steps) == (planned.rows, planned.rehearsed, planned.steps)
    if rehearsal:  # how long the base's answers are is known when they are there
        assert 0.5 < estimated.tokens / planned.tokens < 2
    else:
        assert estimated.tokens == planned.tokens


def test_a_model_from_nothing_rehearses_nothing(make_job: MakeJob) -> None:
    folder = make_job(data=faq(100), rehearsal=0.5)
    fresh = Fresh(layers=1, hidden=32, heads=4)
    spec = replace(Spec.read(folder), method="scratch", fresh=fresh, warm_up=False)
    estimated = checked(folder, spec).of(Estimated)[0]
    heard = Heard()
    Trainer(folder, spec, prepare(folder, spec, Heard()), heard, threading.Event()).progress.emit_plan()
    (planned,) = heard.of(Planned)
    assert (estimated.steps, estimated.tokens, estimated.rehearsed) == (planned.steps, planned.tokens, 0)


def test_a_longer_job_takes_longer(make_job: MakeJob) -> None:
    folder = make_job()
    spec = Spec.read(folder)
    some, more = (
        checked(folder, replace(spec, hyper=replace(spec.hyper, epochs=epochs))).of(Estimated)[0] for epochs in (4, 40)
    )
    assert 0 < some.seconds < more.seconds
    assert more.steps == 10 * some.steps
    assert not (folder / "checkpoint").exists()


def test_lengths_are_told_and_every_row_is_in_the_histogram(make_job: MakeJob) -> None:
    folder = make_job()
    (told,) = checked(folder, replace(Spec.read(folder), warm_up=False)).of(Checked)
    lengths = sorted(len(row.row.ids) for row in prepare(folder, Spec.read(folder), Heard()).encoded)
    assert (told.shortest_tokens, told.longest_tokens) == (lengths[0], lengths[-1])
    assert sum(told.histogram) == told.used == 60
    assert histogram([5, 5, 5]) == (3,) + (0,) * 11
    assert histogram([1, 12]) == (1, *(0,) * 10, 1)
