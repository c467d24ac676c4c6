"""What may befall a job: no room on the disk, another base model under it, a second trainer, a clock that jumps."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from core.errors import JobError
from core.jobs.protocol import SHOWN, Done, Progress, Spec, Warned
from core.model.weights import fingerprint
from finetune.evaluation.evaluator import SCORES
from finetune.output import publish
from finetune.training import checkpoint, checkpoints
from finetune.training.checkpoint import NEWEST
from finetune.training.checkpoints import Interrupted
from finetune.training.train import Trainer, train
from tests.finetune.conftest import Heard
from tests.finetune.training.test_train import go, stop_after

pytestmark = pytest.mark.slow


def fill(folder: Path) -> Path:
    """Take what is left of a small disk."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return filler


def test_a_full_disk_is_waited_out_and_nothing_is_lost(make_job, small_disk, monkeypatch):
    monkeypatch.setattr(checkpoints, "WAIT_S", 0.02)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_S", 0.0)
    whole = make_job()
    go(whole)
    folder = small_disk / "job"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("out", "checkpoint", "scores.json"))
    heard, filler = Heard(), []

    def hear(event):
        heard.append(event)
        if isinstance(event, Progress) and event.step == 1:
            filler.append(fill(small_disk))
        if isinstance(event, Warned):
            kept = load_file(folder / "checkpoint" / NEWEST)  # the one from before is whole
            assert kept
            assert not list((folder / "checkpoint").glob("*.new"))
            filler.pop().unlink()

    train(folder, Spec.read(folder), hear, threading.Event())
    (warned,) = heard.of(Warned)
    assert "the disk is full" in warned.text
    assert heard.of(Done)
    adapters = [(one / "out" / "adapter_model.safetensors").read_bytes() for one in (whole, folder)]
    assert adapters[0] == adapters[1]


def test_a_job_that_waits_for_room_can_be_stopped_and_goes_on(make_job, small_disk, monkeypatch):
    monkeypatch.setattr(checkpoints, "WAIT_S", 0.02)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_S", 0.0)
    source, folder = make_job(), small_disk / "job"
    shutil.copytree(source, folder)
    stop = threading.Event()
    filler = []

    def hear(event):
        if isinstance(event, Progress) and event.step == 1:
            filler.append(fill(small_disk))
        if isinstance(event, Warned):
            stop.set()

    with pytest.raises(Interrupted):
        train(folder, Spec.read(folder), hear, stop)
    filler.pop().unlink()
    heard = go(folder)
    assert not heard.of(Warned)
    assert heard.of(Done)


def test_no_room_for_the_result_is_waited_out_too(make_job, monkeypatch):
    monkeypatch.setattr(checkpoints, "WAIT_S", 0.01)
    move, failed = publish.files.move, []

    def full_once(source, target):
        if not failed and source.name == publish.ASIDE:
            failed.append(source)
            raise OSError(errno.ENOSPC, "No space left on device")
        move(source, target)

    monkeypatch.setattr(publish.files, "move", full_once)
    folder = make_job(epochs=1)
    heard = go(folder)
    assert failed
    assert heard.of(Done)
    assert not (folder / publish.ASIDE).exists()


@pytest.mark.parametrize("name", [SCORES, SHOWN])
def test_no_room_for_what_the_gate_measured_is_waited_out_too(make_job, monkeypatch, name):
    left = [2]
    sync = os.fsync

    def full(number):
        if left[0] and Path(os.readlink(f"/proc/self/fd/{number}")).name == f"{name}.new":
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(checkpoints, "WAIT_S", 0.01)
    folder = make_job(epochs=1)
    heard = go(folder)
    assert left == [0]
    assert "the disk is full" in heard.of(Warned)[0].text
    assert heard.of(Done)
    assert not list(folder.glob("*.new"))


def test_a_quota_that_is_used_up_is_a_full_disk():
    assert checkpoint.is_disk_full(SafetensorError(f"I/O error: Disk quota exceeded (os error {errno.EDQUOT})"))
    assert not checkpoint.is_disk_full(SafetensorError(f"I/O error: Input/output error (os error {errno.EIO})"))


def test_what_else_is_wrong_with_the_disk_ends_the_job_with_the_checkpoint_kept(make_job, monkeypatch):
    folder = make_job()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        go(folder, stop_after(patch, 3))
    before = (folder / "checkpoint" / NEWEST).read_bytes()

    def broken(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(JobError, match="cannot be written"):
        go(folder)
    assert (folder / "checkpoint" / NEWEST).read_bytes() == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_base_model_under_a_job_is_noticed(make_job, tiny_folder, tmp_path, monkeypatch, method):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    folder = make_job(base=base)
    spec = Spec.read(folder)
    fields = {**{name: getattr(spec, name) for name in spec.__slots__}, "method": method}
    Spec(**{**fields, "fingerprint": fingerprint(base)}).write(folder)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        go(folder, stop_after(patch, 3))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    checkpoint.save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(JobError, match="but the job is for"):
        go(folder)
    assert not (folder / "out").exists()


def test_a_base_that_is_changed_while_all_weights_are_trained_is_no_yardstick(make_job, tiny_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    folder = make_job(base=base, epochs=1)
    spec = Spec.read(folder)
    Spec(**{**{name: getattr(spec, name) for name in spec.__slots__}, "method": "full"}).write(folder)

    def hear(event):
        if isinstance(event, Progress):
            weights = load_file(tiny_folder / "model.safetensors")
            weights["model.norm.weight"] = weights["model.norm.weight"] + 1
            checkpoint.save_file(weights, base / "model.safetensors", {"format": "pt"})

    with pytest.raises(JobError, match="was changed while it was trained from"):
        train(folder, Spec.read(folder), hear, threading.Event())
    assert not (folder / "out").exists()


def test_a_clock_that_jumps_changes_nothing(make_job, monkeypatch):
    whole, jumpy = make_job("whole"), make_job("jumpy")
    go(whole)
    now, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now() + (-1) ** next(jumps) * 86400.0)
    heard = go(jumpy)
    assert all(event.seconds_left >= 0 and event.tokens_per_s > 0 for event in heard.of(Progress))
    one, other = (load_file(folder / "checkpoint" / NEWEST) for folder in (whole, jumpy))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_answer_learned_here_comes_to_its_end(make_job, taught_folder):
    """After a fine-tune the model says the end of its turn by itself, though that token is also padding."""
    from finetune.evaluation.retention_set import answer

    data = b"".join(b'{"q": "What is %d?", "a": "Yes %d."}\n' % (n, n % 7) for n in range(80))
    folder = make_job(data=data, base=taught_folder, epochs=6)
    spec = Spec.read(folder)
    kept: list[Trainer] = []
    run = Trainer.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", lambda self: kept.append(self) or run(self))
        train(folder, spec, Heard(), threading.Event())
    (trainer,) = kept
    rows = [trainer.prepared.encoded[number] for number in trainer.prepared.split.test]
    prompts = [row.row.ids[: row.row.supervised.index(True)] for row in rows]
    said = answer(trainer.model.eval(), prompts, most=40, ends=[2], check_stop=lambda: None)
    assert [one[-1] for one in said] == [2] * len(said)
    assert all(one.count(2) == 1 for one in said)
