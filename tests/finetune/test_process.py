"""The real process, as `serve` runs it: its events, its exit status, and what every way of ending it leaves."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.i18n.messages import say
from core.jobs.protocol import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    PREVIEW,
    Alive,
    Checked,
    Done,
    Estimated,
    Evaluated,
    Failed,
    Planned,
    Progress,
    load_event,
)
from finetune import __main__ as program
from finetune.__main__ import Events
from tests.support.paths import ROOT
from tests.support.tiny import edit_config, save_adapter

pytestmark = pytest.mark.slow

WAIT_S = 120


def start(*words, module="finetune"):
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def forked():
    """For what ends before its first step: (exit status, events, log) of the program, torch being loaded once."""
    with start(module="tests.support.finetune_forked") as server:

        def run(folder, action="train"):
            server.stdin.write(f"{action} {folder}\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            out, log = (Path(f"{folder}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
            return status, [load_event(line) for line in out.splitlines()], log

        yield run
        server.stdin.close()


def test_whoever_asks_whether_to_stop_says_that_he_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    events = Events(out)
    assert not events.stop.is_set()
    assert not out.getvalue()
    monkeypatch.setattr(program, "ALIVE_S", 0.0)
    assert not events.stop.is_set()
    assert load_event(out.getvalue()) == Alive()
    events.stop.set()
    assert events.stop.is_set()


def read_until(process, kind):
    """Events up to the first of that kind."""
    events = []
    for line in process.stdout:
        events.append(load_event(line))
        if isinstance(events[-1], kind):
            return events
    raise AssertionError(f"the trainer ended first: {events} {process.stderr.read()}")


def end(process):
    """(exit status, the remaining events); standard input stays open meanwhile. All of stdout must be events."""
    with process:
        events = [load_event(line) for line in process.stdout]
        status = process.wait(WAIT_S)
    return status, events


@pytest.fixture(scope="module")
def long_epochs():
    return 30  # some five seconds, so that there is a middle to cut


def test_a_kill_in_the_middle_leaves_nothing_half_published_and_the_job_goes_on(make_job, long_epochs):
    folder = make_job(epochs=long_epochs, patience=0)
    process = start("train", folder)
    reached = read_until(process, Progress)
    while reached[-1].step < 12:
        reached += read_until(process, Progress)
    process.kill()
    status, rest = end(process)
    assert status == -signal.SIGKILL
    assert not (folder / "out").exists()

    status, events = end(start("train", folder))
    assert status == EXIT_FINISHED
    first = next(event for event in events if isinstance(event, Progress))
    assert first.step > 1
    assert isinstance(events[-1], Done)
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    heard = (event for event in [*reached, *rest, *events] if isinstance(event, Evaluated))
    validated = {event.step: event.loss for event in heard if event.split == "validation"}
    assert manifest["steps"] == first.steps == max(validated)
    assert manifest["kept_step"] == min(validated, key=validated.__getitem__)


@pytest.mark.parametrize("how", ["end of input", "SIGTERM"])
def test_told_to_stop_it_writes_a_checkpoint_and_goes(make_job, long_epochs, how):
    folder = make_job(epochs=long_epochs, patience=0)
    process = start("train", folder)
    read_until(process, Progress)
    began = time.monotonic()
    if how == "SIGTERM":
        process.terminate()
    else:
        process.stdin.close()
    status, events = end(process)
    assert status == EXIT_INTERRUPTED
    assert not any(isinstance(event, Failed | Done) for event in events)
    assert time.monotonic() - began < 20
    assert (folder / "checkpoint" / "state.safetensors").is_file()
    assert not (folder / "out").exists()


def test_a_second_trainer_is_refused_and_the_first_goes_on(make_job, forked):
    folder = make_job(epochs=1000, patience=0)
    first = start("train", folder)
    read_until(first, Progress)
    status, events = forked(folder)[:2]
    assert status == EXIT_FAILED
    (failed,) = events
    assert failed.fault == "ours"
    assert failed.reason == say("en", "training.why_locked", seconds=0)
    assert first.poll() is None
    first.terminate()
    assert end(first)[0] == EXIT_INTERRUPTED


def test_check_tells_what_a_job_takes_and_leaves_what_a_job_has_done(make_job, long_epochs):
    folder = make_job(epochs=long_epochs, patience=0)
    process = start("train", folder)
    planned = next(event for event in read_until(process, Progress) if isinstance(event, Planned))
    process.terminate()
    assert end(process)[0] == EXIT_INTERRUPTED
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()}

    status, events = end(start("check", folder))
    assert status == EXIT_FINISHED
    checked, estimated = events
    assert (type(checked), type(estimated)) == (Checked, Estimated)
    assert (estimated.steps, estimated.tokens, estimated.rows) == (planned.steps, planned.tokens, planned.rows)
    assert estimated.seconds > 0
    assert 50 < estimated.memory_mib < 20_000
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint", "data.jsonl", "lock", PREVIEW, "spec.json"]
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()} == before


def test_bad_data_is_yours_with_its_line(make_job):
    status, events = end(start("train", make_job(data=b'{"q": NaN}\n' * 20)))
    assert status == EXIT_FAILED
    (failed,) = events
    assert (failed.fault, failed.line) == ("yours", 1)
    assert "NaN is not JSON" in failed.reason


def test_a_bad_setting_is_not_said_to_be_the_files_fault(make_job, forked):
    status, (failed,), _ = forked(make_job(rank=0))
    assert (status, failed.fault) == (EXIT_FAILED, "settings")
    assert failed.reason == "finetune.rank = 0 does not work: it must be a whole number from 1 to 256"


def test_why_an_adapter_is_refused_is_told_in_the_language_of_who_brought_it_and_logged_in_english(
    make_job, tiny_folder, forked
):
    folder = make_job()
    candidate = save_adapter(tiny_folder, folder / "candidate", seed=1, r=4)
    edit_config(candidate, use_dora=True)
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, "candidate": "candidate", "language": "zh"}))
    status, events, log = forked(folder, "gate")
    (logged,) = (line for line in log.splitlines() if "train.refused" in line)
    assert status == EXIT_FAILED
    assert events[-1] == Failed("settings", "这个适配器不能使用：不支持 use_dora=True，只支持线性层上的普通 LoRA")
    assert "the adapter cannot be used: use_dora=True is not supported, only plain LoRA" in logged


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"data_sha256": "0" * 64}, "training.why_data_damaged"),
        ({"model": "nowhere"}, "training.why_base"),
        ({"fingerprint": "0" * 64}, "training.why_base_changed"),
    ],
)
def test_what_is_ours_is_said_in_the_language_of_who_asked(make_job, forked, changed, key):
    folder = make_job()
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, **changed, "language": "zh"}))
    status, events, _ = forked(folder)
    assert status == EXIT_FAILED
    assert events[-1] == Failed("ours", say("zh", key), of_use=key != "training.why_base_changed")


def test_a_reason_that_has_no_sentence_is_told_in_one(make_job, forked):
    folder = make_job()
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, "dtype": "float16", "language": "zh"}))
    _, events, _ = forked(folder)
    before, after = say("zh", "training.why_unexpected", error="|").split("|")
    assert events[-1].reason.startswith(f"{before}dtype=float16 is not")
    assert events[-1].reason.endswith(after)


def test_a_folder_that_is_no_job_fails_with_a_reason(tmp_path, forked):
    status, events, _ = forked(tmp_path)
    assert status == EXIT_FAILED
    assert "spec.json" in events[0].reason
