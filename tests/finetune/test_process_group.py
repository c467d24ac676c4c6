"""Several processes do what one does: the same gradients, the same job, one voice; under torchrun and accelerate."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from core.jobs.protocol import Checked, Done, Judged, Progress, load_event
from finetune.process_group import SHARDED
from finetune.training.checkpoint import BEST, NEWEST
from tests.finetune.training.test_methods import of
from tests.support import finetune_one_step
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

EXACT = {"dropout": 0.0, "clip_value": 0.01, "clip_norm": 0.05}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(*words, sharded=False, launcher="torchrun"):
    by_torch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port"]
    by_accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                     "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]  # fmt: skip
    command = [*(by_torch if launcher == "torchrun" else by_accelerate), str(free_port()), "-m", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    if sharded:
        environment[SHARDED] = "true"
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return [load_event(line) for line in out.splitlines()]


def test_two_processes_have_the_gradients_of_one_with_the_double_batch(make_job, tmp_path):
    """A delta and all weights, whole and with the blocks sharded (FSDP2); clipped by value and by norm."""
    out = tmp_path / "out"
    out.mkdir()
    kinds = ["lora", "full"]
    alone = {kind: finetune_one_step.gradients(of(make_job(f"alone-{kind}", **EXACT), method=kind)) for kind in kinds}
    names = [f"{how}-{kind}" for how in ("whole", "sharded") for kind in kinds]
    jobs = [of(make_job(name, **EXACT), method=name.partition("-")[2]) for name in names]
    finish(launch("tests.support.finetune_one_step", out, *jobs))
    for name in names:
        found, wanted = load_file(out / f"{name}.safetensors"), alone[name.partition("-")[2]]
        assert found.keys() == wanted.keys()
        assert (found["loss"][4] > 0) == name.startswith("sharded")
        assert 0 < found["loss"][2] < 1
        torch.testing.assert_close(found["loss"][:4], wanted["loss"][:4], atol=1e-5, rtol=1e-5)
        for key in wanted:
            if key != "loss":
                torch.testing.assert_close(found[key], wanted[key], atol=1e-6, rtol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.drill), True])
def test_a_job_of_two_processes_is_cut_and_goes_on_with_the_same_bits_and_one_voice(make_job, sharded):
    whole, parts = make_job("whole", epochs=3), make_job("parts", epochs=3)
    events = finish(launch("finetune", "train", whole, sharded=sharded))
    for kind, times in ((Checked, 1), (Judged, 1), (Done, 1)):
        assert sum(isinstance(event, kind) for event in events) == times
    process = launch("finetune", "train", parts, sharded=sharded)
    for line in process.stdout:
        if isinstance(load_event(line), Progress):
            break
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to its processes
    process.communicate(timeout=120)
    assert not (parts / "out").exists()
    finish(launch("finetune", "train", parts, sharded=sharded))
    for name in (NEWEST, BEST):
        one, other = (load_file(folder / "checkpoint" / name) for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    adapters = [(folder / "out" / "adapter_model.safetensors").read_bytes() for folder in (whole, parts)]
    assert adapters[0] == adapters[1]
    assert json.loads((whole / "out" / "manifest.json").read_text())["processes"] == 2


def test_the_same_command_runs_under_accelerate_launch(make_job):
    folder = of(make_job(epochs=1), method="full")
    events = finish(launch("finetune", "train", folder, launcher="accelerate"))
    assert isinstance(events[-1], Done)
    assert (folder / "out" / "model.safetensors").exists()


def test_the_entry_for_ray_does_the_job_and_reports_once(make_job, monkeypatch):
    """`ray.train.report` is all that is used of ray, which is not installed here; a stand-in hears it."""
    reported = []
    stand_in = types.ModuleType("ray.train")
    stand_in.report = reported.append
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.train", stand_in)
    from finetune.ray_worker import train_func

    folder = make_job(epochs=1)
    train_func({"job": str(folder)})
    (numbers,) = reported
    assert numbers["test_loss"] < numbers["test_loss_base"]
    kinds = [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "checked"
    assert kinds[-1] == "finished"
