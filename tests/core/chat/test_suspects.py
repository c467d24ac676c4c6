"""What a crash makes a suspect: what was being generated, which runs alone next; never what had not begun."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from core.chat import inbox
from core.chat.admission import Isolation
from core.i18n.messages import say
from tests.support.paths import ROOT
from tests.support.running_service import OWNER, RunningService, running_service
from tests.support.waiting import DEADLINE_S


async def outcomes(it: RunningService) -> dict[str, int]:
    rows = await it.database.read(lambda tx: tx.all("SELECT outcome, count(*) AS n FROM inbox GROUP BY 1"))
    return {row["outcome"]: row["n"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(("where", "most"), [("reply", 1), ("question", inbox.MAX_CRASHES)])
async def test_a_question_that_kills_the_process_takes_no_other_along(tmp_path: Path, where: str, most: int) -> None:
    async with running_service(tmp_path, running=False) as it:
        for number in range(9):
            await it.send(f"innocent {number}", conversation=f"c{number}", user=f"u{number}")
        await it.send("poison", conversation="poison")
    command = [sys.executable, "-m", "tests.support.poisoned", str(tmp_path), where]
    died = 0
    while status := await asyncio.to_thread(lambda: subprocess.run(command, cwd=ROOT, check=False).returncode):
        assert status == 9
        died += 1
        assert died <= most + inbox.MAX_STRIKES
    async with running_service(tmp_path, running=False) as it:
        assert await outcomes(it) == {"replied": 9, "failed": 1}
        assert await it.count("inbox", "state = 'dead' AND strikes > 0") == 1
        assert await it.count("ledger") == 9


async def test_clean_stops_of_a_slow_model_blame_nothing(tmp_path: Path) -> None:
    for life in range(inbox.MAX_CRASHES + inbox.MAX_STRIKES):
        async with running_service(tmp_path, delay_s=60.0, running=False) as it:
            run = asyncio.create_task(it.service.run())
            if not life:
                for number in range(40):
                    await it.send(f"question {number}", conversation=f"c{number}", user=f"u{number}")
            async with asyncio.timeout(DEADLINE_S):
                while len(it.engine.requests) < 40:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await it.service.drain(0.1)
            run.cancel()
    async with running_service(tmp_path) as it:
        await it.settled()
        assert await it.count("inbox", "suspect OR strikes OR attempts") == 0
        assert await outcomes(it) == {"replied": 40}


async def test_what_is_stored_after_a_clean_stop_is_not_done_again(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("/usage")
        (row,) = await it.database.write(lambda tx: inbox.take(tx, 10, {("fake", "bot")}, ()))
        await it.database.write(inbox.release)
        await it.database.write(lambda tx: inbox.mark_generated(tx, row.id))
        assert await it.count("inbox", "state = 'generated'") == 1


async def test_what_had_not_begun_is_no_suspect_and_what_had_runs_alone(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        for name in ("begun", "waiting", "another"):
            await it.send(name, conversation=name)
        rows = await it.database.write(lambda tx: inbox.take(tx, 10, {("fake", "bot")}, ()))
        for row in rows:
            if row.text != "waiting":
                await it.database.write(lambda tx, row=row: inbox.mark_started(tx, row))  # type: ignore[misc]
        assert await it.database.write(inbox.recover) == 2  # as after a crash
        taken = await it.database.write(lambda tx: inbox.take(tx, 10, {("fake", "bot")}, ()))
        assert [(row.text, row.suspect) for row in taken] == [("waiting", False), ("begun", True)]
        assert (
            await it.database.write(lambda tx: inbox.take(tx, 10, {("fake", "bot")}, [row.id for row in taken])) == []
        )
        assert await it.database.write(inbox.recover) == 2
        taken = await it.database.write(lambda tx: inbox.take(tx, 10, {("fake", "bot")}, ()))
        struck = {row.text: row.strikes for row in taken}
        assert struck == {"waiting": 0, "begun": 1}  # until it is answered, or given up, the others wait
        await it.database.write(lambda tx: tx.run("UPDATE inbox SET begun = 'taken' WHERE begun = 'alone'"))
        await it.database.write(inbox.recover)  # it died beside another row
        assert await it.count("inbox", "strikes > 0") == 0


async def test_what_was_given_up_is_listed_and_tried_again_by_an_operator(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as it:
        await it.send("poison", key="poison")
        last = "UPDATE inbox SET state = 'running', begun = 'alone', suspect = 1, strikes = ?"
        await it.database.write(lambda tx: tx.run(last, [inbox.MAX_STRIKES - 1]))
    async with running_service(tmp_path) as it:
        await it.settled()
        assert it.bot.said() == [say("en", "error.gave_up")]
        assert await it.ask("/inbox list", user=OWNER, conversation="o") != say("en", "inbox.none")
        assert "poison" not in it.bot.said()[-1]
        await it.ask("/inbox retry 99", user=OWNER, conversation="o")
        assert it.bot.said()[-1] == say("en", "inbox.unknown", typed="99")
        await it.ask("/inbox retry 1", user=OWNER, conversation="o")
        await it.settled()
        assert it.bot.said()[-1] == "you said poison"
        assert await it.count("ledger") == 1
        assert await it.ask("/inbox list", user=OWNER, conversation="o") == say("en", "inbox.none")


async def test_retry_takes_the_question_that_was_refused_and_not_the_one_before(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.ask("first")
        await it.database.write(lambda tx: tx.run("UPDATE channel SET per_hour = 1"))
        assert (await it.ask("second")).startswith("You have sent")
        await it.database.write(lambda tx: tx.run("UPDATE channel SET per_hour = 0"))
        assert await it.ask("/retry") == "you said second"
        assert await it.ask("/retry") == "you said second"  # another answer to the same
        assert await it.count("turn", "role = 'user'") == 2
        assert await it.count("ledger") == 3


async def test_retry_repeats_nothing_from_before_a_new_conversation(tmp_path: Path) -> None:
    async with running_service(tmp_path) as it:
        await it.database.write(lambda tx: tx.run("UPDATE channel SET per_hour = 1"))
        await it.ask("first")
        await it.ask("refused")
        await it.ask("/new")
        assert await it.ask("/retry") == say("en", "service.nothing_to_retry")


async def test_one_section_is_alone_and_the_others_run_together() -> None:
    lock, seen = Isolation(), list[str]()

    async def work(name: str, *, alone: bool) -> None:
        async with lock.section(alone=alone):
            seen.append(f"+{name}")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            seen.append(f"-{name}")

    tasks = [asyncio.create_task(work(name, alone=name.isupper())) for name in "abCDe"]
    tasks[3].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert seen == ["+a", "+b", "-a", "-b", "+C", "-C", "+e", "-e"]
    async with asyncio.timeout(5):
        await work("F", alone=True)


@pytest.mark.parametrize("steps", range(6))
async def test_a_section_that_is_cancelled_at_any_moment_holds_up_nobody(steps: int) -> None:
    lock = Isolation()

    async def work(*, alone: bool) -> None:
        async with lock.section(alone=alone):
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(alone=alone)) for alone in (False, True, False, True)]
    for _ in range(steps):
        await asyncio.sleep(0)
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(5):
        await work(alone=True)
