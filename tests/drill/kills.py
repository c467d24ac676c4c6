"""Kills the whole flow at random points, and proves that nothing is lost, doubled or charged wrongly.

    python -m tests.drill.kills --kills 60 --torn 30 --seed 1 [--json FILE]

A fresh process per life is forked from this one, which has imported everything and started no thread. Each life
takes what the fake platform has, answers it with the scripted engine, and is cut by SIGKILL; after each death the
invariants are checked on the file, and a copy whose WAL was cut or garbled is opened and checked as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from core.channels import bindings, directory, terminal
from core.engine.protocol import Request
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.storage.home import Home, Lock
from tests.drill.lives import copy_of, fork, kill_at, open_service, opened, print_report, progress, violations
from tests.drill.platform import Platform, PlatformOutlet, update
from tests.support.database import write_now

CONVERSATIONS, USERS, PER_KILL = 7, 5, 4
WRITES = """SELECT (SELECT count(*) + count(nullif(state, 'new')) + count(closed_ms) FROM inbox)
    + (SELECT count(*) + count(receipt) FROM part)"""
OWNER = "u0"


def plan(seed: int, count: int) -> list[tuple[str, str, str, bool]]:
    """(text, conversation, user, is a stop press) for each update; the same for the same seed."""
    randomness = random.Random(seed)
    updates = []
    for n in range(count):
        conversation, draw = f"c{randomness.randrange(CONVERSATIONS)}", randomness.random()
        user = f"u{randomness.randrange(USERS)}"
        if draw < 0.06:
            updates.append((f'/channel set drill title="title {n}"', conversation, OWNER, False))
        elif draw < 0.10:
            updates.append(("/usage", conversation, user, False))
        elif draw < 0.14:
            updates.append(("/retry", conversation, user, False))
        elif draw < 0.16:
            updates.append(("/new", conversation, user, False))
        elif draw < 0.20:
            updates.append(("", conversation, user, True))
        else:
            words = " ".join(["word"] * randomness.randrange(1, 20))
            updates.append((f"question {n} {words}", conversation, user, False))
    return updates


def answer(request: Request) -> str:
    return f"answer to {request.messages[-1].text}"


def prepare(home: Home) -> None:
    """The channel, its price and its operator, before the first life."""
    with Lock(home), Database(home.database, Cipher.open(home.key_file, create=True)) as database:

        def work(tx: Tx) -> None:
            terminal.ensure_terminal(tx, "home")
            channel = directory.create_channel(tx, "drill", title="Drill")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0 WHERE id = ?", [channel.id])
            tx.run(
                "UPDATE price SET in_nano = 150, out_nano = 601, share_bps = 3333 WHERE channel_id = ?", [channel.id]
            )
            bindings.bind(tx, "fake", "bot", "", channel.id)
            tx.insert(
                "operator",
                user_hash=tx.cipher.hash_user("fake", "bot", OWNER),
                label="owner",
                granted_by="drill",
                granted_ms=tx.now_ms,
            )

        write_now(database, work)


async def live(home: Home, platform: Platform, seed: int, updates: list[tuple[str, str, str, bool]]) -> None:
    """One life: accept what is not acknowledged, with repeats, and answer until all is settled."""
    randomness = random.Random(seed)
    async with open_service(home, answer, delay_s=0.0005) as service:
        service.register("fake", "bot", PlatformOutlet(platform, randomness))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(service.run())
            done = platform.acknowledged()
            waiting = [n for n in range(len(updates)) if n not in done]
            while waiting:
                size = randomness.randrange(1, 6)
                batch = waiting[:size] + [n for n in done if randomness.random() < 3 / (len(done) + 1)]
                await service.accept(
                    *(
                        update(n, updates[n][0], conversation=updates[n][1], user=updates[n][2], stop=updates[n][3])
                        for n in batch
                    )
                )
                for n in waiting[:size]:
                    platform.write(platform.acks, {"n": n})
                waiting = waiting[size:]
                await asyncio.sleep(randomness.random() * 0.01)
            await service.settled("fake", "bot")
            await service.drain(5)
            running.cancel()


def tear(wal: Path, randomness: random.Random) -> None:
    """Cut the WAL at a random byte, or garble up to 64 bytes at one."""
    data = bytearray(wal.read_bytes())
    at = randomness.randrange(len(data))
    if randomness.random() < 0.5:
        del data[at:]
    else:
        noise = randomness.randbytes(randomness.randrange(1, 65))
        data[at : at + len(noise)] = noise
    wal.write_bytes(data)


def is_folding(home: Home) -> bool:
    """Whether the kill fell into a checkpoint: pages in the file are newer than the WAL's beginning.

    Then SQLite needs every byte of the WAL, and no database of this kind survives its loss; all commits in it are
    synced, so no crash takes them. The word is nBackfillAttempted of the WAL index (sqlite.org/walformat.html, 2.1).
    """
    shm = Path(f"{home.database}-shm")
    return not shm.exists() or int.from_bytes(shm.read_bytes()[128:132], sys.byteorder) > 0


def audit(tx: Tx, platform: Platform, updates: list[tuple[str, str, str, bool]]) -> tuple[list[str], Counter[str]]:
    """What the platform holds against what the books say, after all is settled."""
    problems: list[str] = []
    outcomes: Counter[str] = Counter()
    held = platform.messages()
    rows = {int(row["update_key"]): row for row in tx.all("SELECT * FROM inbox")}
    if set(rows) != set(range(len(updates))):
        problems.append(f"{len(updates) - len(rows)} updates are not in the inbox")
    booked: set[str] = set()
    for n, row in sorted(rows.items()):
        outcomes[row["outcome"]] += 1
        handles = [
            part["handle"]
            for part in tx.all(
                "SELECT handle FROM part JOIN delivery ON delivery.id = delivery_id WHERE inbox_id = ? ORDER BY number",
                [row["id"]],
            )
        ]
        booked.update(handles)
        finals = {held[handle].final for handle in handles}
        said = "".join(held[handle].text for handle in handles)
        text, _, _, stop = updates[n]
        if row["state"] not in ("done", "dead"):
            problems.append(f"update {n} is {row['state']}")
        elif stop:
            if handles:
                problems.append(f"stop {n} has a message")
        elif row["outcome"] in ("replied", "command"):
            if finals != {"finish"}:
                problems.append(f"update {n} is {row['outcome']} but the platform holds {finals or 'nothing'}")
            complete = tx.value("SELECT finish FROM generation WHERE inbox_id = ?", [row["id"]]) == "end"
            if text.startswith("question") and complete and said != f"answer to {text}".strip():
                problems.append(f"update {n} was answered {said!r}")
        elif row["outcome"] == "failed":
            problems.append(f"update {n} was refused, although nothing is wrong with it")
        elif not handles or finals != {"fail"}:
            problems.append(f"update {n} ended {row['outcome']} without a visible refusal: {finals}")
    loose = [handle for handle, message in held.items() if handle not in booked]
    outcomes["orphans"] = len(loose)
    problems += [f"{handle} is final but in no book" for handle in loose if held[handle].final]
    replied = sum(1 for row in rows.values() if row["outcome"] == "replied")
    charged = tx.value("SELECT count(*) FROM ledger")
    if charged != replied:
        problems.append(f"{charged} charges for {replied} replies")
    commands = sum(1 for text, *_ in updates if text.startswith("/channel set"))
    audited = tx.value("SELECT count(*) FROM audit WHERE action LIKE 'channel%set'")
    if audited != commands:
        problems.append(f"{commands} settings took effect {audited} times")
    return problems, outcomes


def _start(home: Home, platform: Platform, seed: int, updates: list[tuple[str, str, str, bool]]) -> int:
    return fork(lambda: live(home, platform, seed, updates))


def drill(kills: int, torn: int, seed: int, folder: Path) -> dict[str, object]:
    randomness = random.Random(seed)
    home, platform = Home(folder / "home"), Platform(folder)
    home.create()
    prepare(home)
    cipher = Cipher.open(home.key_file, create=False)
    problems: list[str] = []
    lives = died = torn_checked = 0
    began = time.monotonic()
    while died < kills or torn_checked < torn:
        lives += 1
        updates = plan(seed, lives * PER_KILL)
        before = progress(home, WRITES)
        pid = _start(home, platform, randomness.randrange(2**31), updates)
        status = kill_at(home, pid, WRITES, before + randomness.randrange(1, 6 * PER_KILL), randomness)
        if os.WIFEXITED(status):  # it had done all before the kill came
            problems += [f"life {lives} ended by itself with {status}"] if status else []
            continue
        died += 1
        copy = copy_of(home, folder)
        problems += [f"after kill {died}: {problem}" for problem in violations(copy, cipher)]
        for _ in range(min(5, died * torn // kills - torn_checked)):
            copy = copy_of(home, folder)
            wal = Path(f"{copy}-wal")
            if not wal.exists() or not wal.stat().st_size or is_folding(home):
                break  # nothing to tear after this kill: the next ones make up for it
            tear(wal, randomness)
            torn_checked += 1
            problems += [f"torn WAL after kill {died}: {problem}" for problem in violations(copy, cipher)]
    _, status = os.waitpid(_start(home, platform, randomness.randrange(2**31), updates), 0)
    if status:
        problems.append(f"the last life ended with {status}")
    problems += violations(home.database, cipher)
    with opened(home.database, cipher) as tx:
        books, outcomes = audit(tx, platform, updates)
    return {
        "lives": lives + 1,
        "kills": died,
        "torn": torn_checked,
        "updates": len(updates),
        "outcomes": dict(outcomes),
        "violations": problems + books,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--torn", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = drill(given.kills, given.torn, given.seed, Path(folder))
    print_report(result, given.json)


if __name__ == "__main__":
    main()
