"""Kills trainers, and the program that serves, at random points: what is made in the end is what an uncut run makes.

    python -m tests.drill.finetune --trainers 40 --servers 10 --seed 1 [--json FILE]

A trainer's life is forked from this process, which has imported everything and computed nothing. It is cut by the
clock, or by itself at one of its writes: before or after an fsync or a rename. After each death the job folder is
looked at; after the last one the job is done in peace, and adapter and checkpoints are compared byte by byte. A
server's life runs the real supervisor, which starts real trainers; it is cut by the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from core.adapters import folders
from core.channels import bindings, directory, terminal
from core.chat import conversations
from core.config.sections import HyperParameters
from core.delivery.deliveries import Deliveries, new_delivery
from core.engine.protocol import EngineInfo
from core.errors import AppError
from core.jobs import jobs
from core.jobs.process import COMMAND
from core.jobs.protocol import Spec
from core.jobs.supervisor import JobSupervisor
from core.jobs.worker import TrainingSettings, WorkerContext
from core.model.weights import fingerprint
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.storage.home import Home, Lock
from core.types import Address, Caller
from core.usage import ledger, prices
from finetune.__main__ import run
from finetune.training import checkpoints
from finetune.training.checkpoint import BEST, NEWEST
from tests.drill.platform import Platform, PlatformOutlet
from tests.finetune.conftest import faq
from tests.support.database import read_now, write_now
from tests.support.tiny import save_tiny

HYPER = HyperParameters(rank=4, alpha=8, learning_rate=1e-2, epochs=4, rows_per_step=8, patience=3)
WRITES = ("fsync", "replace", "rename")
LIFE_S = 60.0
PRICE = 7  # of a trained token
DATA = faq(60)


# --- trainers ---


def lay_out(folder: Path, base: Path, method: str) -> None:
    folder.mkdir(parents=True)
    (folder / "data.jsonl").write_bytes(DATA)
    Spec(
        job="j1",
        model=str(base),
        fingerprint=fingerprint(base),
        data="data.jsonl",
        data_sha256=hashlib.sha256(DATA).hexdigest(),
        label="drill@1",
        nice=0,
        method=method,  # type: ignore[arg-type]
        hyper=HYPER,
    ).write(folder)


def trainer(folder: Path, dies_at: tuple[int, bool] | None) -> int:
    """Fork one life: its process id. `dies_at` is (number of the write, whether before it)."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setsid()
        torch.set_num_threads(1)
        checkpoints.CHECKPOINT_S = 0.0
        if dies_at is not None:
            _die_at(*dies_at)
        status = run("train", folder, _Silent(), threading.Event())  # type: ignore[arg-type]
    finally:
        os._exit(status)


class _Silent:
    def __call__(self, event: object) -> None:
        pass


def _die_at(number: int, before: bool) -> None:
    left = [number]

    def cut(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **named: object) -> object:
            left[0] -= 1
            if not left[0] and before:
                os.kill(os.getpid(), signal.SIGKILL)
            made = real(*given, **named)
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        return call

    for name in WRITES:
        setattr(os, name, cut(getattr(os, name)))


def look_at(folder: Path) -> list[str]:
    """A result is whole or not there; so is a checkpoint."""
    problems = []
    out = folder / "out"
    if out.exists():
        try:
            if Spec.read(folder).method == "lora":
                folders.inspect(out)
            json.loads((out / "manifest.json").read_text())
        except (AppError, OSError, ValueError) as error:
            problems.append(f"a result that is not whole: {error}")
    for name in (NEWEST, BEST):
        path = folder / "checkpoint" / name
        if path.exists() and not _is_whole(path):
            problems.append(f"{name} is not whole")
    return problems


def _is_whole(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return bool(json.loads(file.metadata()["position"])["identity"])
    except (OSError, SafetensorError, ValueError):
        return False


def made(folder: Path) -> dict[str, str]:
    """What has to be the same, by name. Times differ, and stand in a checkpoint's header: tensors are compared."""
    from safetensors.torch import load_file

    found = {}
    for path in [*(folder / "checkpoint" / name for name in (NEWEST, BEST)), *(folder / "out").glob("*.safetensors")]:
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        found[path.name] = digest.hexdigest()
    return found


def drill_trainers(kills: int, randomness: random.Random, folder: Path) -> dict[str, object]:
    base = save_tiny(folder / "base", initializer_range=0.05)
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    wanted, lasts = {}, {}
    for method in ("lora", "full"):
        lay_out(folder / f"uncut-{method}", base, method)
        began = time.monotonic()
        _wait(trainer(folder / f"uncut-{method}", None))
        lasts[method] = time.monotonic() - began
        wanted[method] = made(folder / f"uncut-{method}")
    died = number = 0
    while died < kills:
        number += 1
        method = "full" if number % 4 == 0 else "lora"
        job = folder / f"job-{number}"
        lay_out(job, base, method)
        for _ in range(randomness.randrange(1, 6)):
            by_clock = randomness.random() < 0.5
            pid = trainer(job, None if by_clock else (randomness.randrange(1, 50), randomness.random() < 0.5))
            if by_clock:
                time.sleep(randomness.random() * lasts[method])
                os.kill(pid, signal.SIGKILL)
            status = _wait(pid)
            if os.WIFSIGNALED(status):
                died += 1
                outcomes["by clock" if by_clock else "at a write"] += 1
                problems += [f"job {number}: {problem}" for problem in look_at(job)]
            elif os.WEXITSTATUS(status):
                problems.append(f"job {number} ended with {os.WEXITSTATUS(status)}")
        if status := os.waitstatus_to_exitcode(_wait(trainer(job, None))):
            problems.append(f"job {number} ended with {status}")
        elif made(job) != wanted[method]:
            problems.append(f"job {number} ({method}) made something else than an uncut run")
        elif (job / "out.new").exists():
            problems.append(f"job {number} left out.new")
        shutil.rmtree(job)
    return {"kills": died, "jobs": number, "outcomes": dict(outcomes), "violations": problems}


def _wait(pid: int) -> int:
    until = time.monotonic() + LIFE_S
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


# --- servers ---


def open_home(folder: Path, base: Path) -> tuple[Home, EngineInfo]:
    home = Home(folder / "home")
    home.create()
    sha256 = hashlib.sha256(DATA).hexdigest()
    (home.datasets / sha256).write_bytes(DATA)

    def work(tx: Tx) -> None:
        terminal.ensure_terminal(tx, "home")
        channel = directory.create_channel(tx, "drill", title="Drill")
        prices.set_price(tx, channel.id, 0, 0, 3000, PRICE)
        bindings.bind(tx, "fake", "bot", "", channel.id)
        at = Address("fake", "bot", "place", "c")
        caller = Caller(
            tx.cipher.hash_user("fake", "bot", "u"), at, channel, "en", 0, conversations.conversation_id(tx, at, 1)
        )
        tx.insert(
            "dataset",
            sha256=sha256,
            name="faq.jsonl",
            source="file",
            size_bytes=len(DATA),
            brought_by="x",
            created_ms=1,
        )
        job = jobs.create(tx, caller, sha256, "faq.jsonl")
        jobs.pin_price(tx, job.id)
        new_delivery(tx, job_id=job.id)

    with Lock(home), Database(home.database, Cipher.open(home.key_file, create=True)) as database:
        write_now(database, work)
    return home, EngineInfo("tiny", fingerprint(base), "tiny", 1000, base)


async def serve(home: Home, info: EngineInfo, platform: Platform, seed: int) -> None:
    """Until the job has ended and that is told."""
    with Lock(home):
        async with Database(home.database, Cipher.open(home.key_file, create=False)) as database:
            deliveries = Deliveries(database)
            deliveries.register("fake", "bot", PlatformOutlet(platform, random.Random(seed)))
            settings = TrainingSettings(hyper=HYPER, nice=0, retry_s=0.05)
            training = JobSupervisor(WorkerContext(database, home, deliveries, info, settings, COMMAND))
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(training.run())
                while not await database.read(lambda tx: jobs.is_delivered(tx, 1)):  # noqa: ASYNC110  # the books tell
                    await asyncio.sleep(0.05)
                running.cancel()


def server(home: Home, info: EngineInfo, platform: Platform, seed: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        asyncio.run(serve(home, info, platform, seed))
        status = 0
    finally:
        os._exit(status)


def drill_servers(kills: int, randomness: random.Random, folder: Path) -> dict[str, object]:
    """A job after another, each with a server that is killed some times, until there were so many kills."""
    base = save_tiny(folder / "served-base", initializer_range=0.05)
    problems: list[str] = []
    died = number = 0
    results = set()
    while died < kills:
        number += 1
        place = folder / f"served-{number}"
        place.mkdir()
        (home, info), platform = open_home(place, base), Platform(place)
        for _ in range(min(kills - died, randomness.randrange(1, 6))):
            pid = server(home, info, platform, randomness.randrange(2**31))
            time.sleep(randomness.random() * 9)
            os.kill(pid, signal.SIGKILL)
            died += os.WIFSIGNALED(_wait(pid))
            problems += [f"job {number}: {problem}" for problem in _half_published(home)]
        if status := _wait(server(home, info, platform, 0)):
            problems.append(f"the last server of job {number} ended with {status}")
        found, digests = _audit(home, platform)
        problems += [f"job {number}: {problem}" for problem in found]
        results |= digests
    if len(results) > 1:
        problems.append(f"the same job made {len(results)} different adapters")
    return {"kills": died, "jobs": number, "adapters": sorted(results), "violations": problems}


def _half_published(home: Home) -> list[str]:
    """A folder among the adapters is whole, whatever the books know of it by now."""
    problems = []
    for folder in home.adapters.iterdir():
        try:
            if not folder.name.endswith(".new") and folders.inspect(folder).sha256 != folder.name:
                problems.append(f"{folder.name[:12]} is not what its name says")
        except AppError as error:
            problems.append(f"{folder.name[:12]}: {error.detail}")
    return problems


def _audit(home: Home, platform: Platform) -> tuple[list[str], set[str]]:
    """(problems, the hash of the weights that were made)."""
    problems = _half_published(home)
    with Database(home.database, Cipher.open(home.key_file, create=False)) as database:
        job = read_now(database, lambda tx: tx.one("SELECT state, reason, result FROM job WHERE id = 1"))
        known = read_now(database, lambda tx: [row["sha256"] for row in tx.all("SELECT sha256 FROM adapter")])
        charged = read_now(database, lambda tx: tx.all("SELECT job_id, tokens_trained, gross_nano FROM ledger"))
        problems += read_now(database, ledger.check)
    assert job is not None
    if [row["job_id"] for row in charged] != [1] or not charged[0]["gross_nano"] == charged[0][
        "tokens_trained"
    ] * PRICE > 0:
        problems.append(f"it is charged as {charged}")
    if job["state"] != "published":
        problems.append(f"it is {job['state']}: {job['reason']}")
    if known != [job["result"]] or [path.name for path in home.adapters.iterdir()] != known:
        problems.append(f"the books know {known}, the disk holds {[path.name for path in home.adapters.iterdir()]}")
    if any(home.jobs.iterdir()):
        problems.append("its folder is still there")
    final = [message.text for message in platform.messages().values() if message.final == "finish"]
    if not final or "drill@1" not in " ".join(final):
        problems.append(f"its end was told as {final}")
    weights = [home.adapters / sha256 / "adapter_model.safetensors" for sha256 in known]
    return problems, {hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}


def drill(trainers: int, servers: int, seed: int, folder: Path) -> dict[str, object]:
    began = time.monotonic()
    found = {
        "trainers": drill_trainers(trainers, random.Random(seed), folder) if trainers else {"violations": []},
        "servers": drill_servers(servers, random.Random(seed + 1), folder) if servers else {"violations": []},
    }
    violations = [problem for part in found.values() for problem in part["violations"]]  # type: ignore[attr-defined]
    return {**found, "violations": violations, "seconds": round(time.monotonic() - began, 1), "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", type=int, default=40)
    parser.add_argument("--servers", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    memory = Path("/dev/shm")  # a killed process loses nothing there, and nobody waits for a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        result = drill(given.trainers, given.servers, given.seed, Path(folder))
    report = json.dumps(result, indent=2)
    if given.json:
        given.json.write_text(report)
    sys.stdout.write(report + "\n")
    sys.exit(bool(result["violations"]))


if __name__ == "__main__":
    main()
