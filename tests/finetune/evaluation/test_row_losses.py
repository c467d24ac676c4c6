"""The real trainer under the supervisor of `serve`: what it makes is what is published, also after a break."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from core.adapters import folders
from core.commands.parser import parse
from core.config.sections import HyperParameters
from core.engine.protocol import EngineInfo
from core.jobs import datasets
from core.jobs.commands import PreparedData, begin
from core.jobs.process import COMMAND
from core.jobs.worker import TrainingSettings
from core.model.weights import fingerprint
from core.storage.database import Tx
from tests.finetune.conftest import faq
from tests.support.running_jobs import RunningJobs, WatchedBot, running_jobs

pytestmark = pytest.mark.slow

HYPER = HyperParameters(rank=4, alpha=8, learning_rate=1e-2, epochs=3, rows_per_step=8)


async def order(it: RunningJobs) -> None:
    data = faq(60) + b"not a row\n"
    sha256 = hashlib.sha256(data).hexdigest()
    await asyncio.to_thread((it.home.datasets / sha256).write_bytes, data)

    def work(tx: Tx) -> None:
        datasets.keep_dataset(tx, sha256, "faq.jsonl", source="file", size_bytes=len(data), brought_by="someone")
        begin(tx, it.caller(tx), parse("/finetune"), PreparedData(sha256, "faq.jsonl", agreed=True))

    await it.database.write(work)
    it.training.wake()


async def test_the_real_trainer_is_stopped_goes_on_and_its_result_is_published(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.jobs.progress.SHOW_S", 0.0)
    monkeypatch.setattr("tests.support.running_jobs.WAIT_S", 120)
    info = EngineInfo("tiny", await asyncio.to_thread(fingerprint, tiny_folder), "tiny", 1000, tiny_folder)
    settings = TrainingSettings(hyper=HYPER, nice=0)
    bot = WatchedBot()
    async with running_jobs(tmp_path, bot=bot, command=COMMAND, info=info, settings=settings) as it:
        await order(it)
        await bot.until(lambda: "▓" in bot.newest)
        await it.stop(60)
        assert not bot.final
    async with running_jobs(tmp_path, bot=bot, command=COMMAND, info=info, settings=settings) as it:
        said = await it.ended()
        (version,) = await it.versions()
        candidate = await asyncio.to_thread(folders.inspect, it.home.adapters / version["sha256"])
        assert candidate.base_fingerprint == info.fingerprint
        assert "acme@1" in said
        assert "60 of 61" in said
        assert "line 61" in said
        assert len(bot.opened) == 1
