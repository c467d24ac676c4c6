"""Kills the Telegram bot at random points, and proves that nothing is lost, no final answer doubled, the books right.

    python -m tests.drill.telegram --updates 1000 --kills 20 --seed 1 [--json FILE]

The fake Telegram lives in a process of its own and outlives every program that is killed. It repeats updates, hands
them out in another order, and takes drafts and edits.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from bots.shared.rate_limits import Rate
from bots.telegram.bot import TelegramBot
from bots.telegram.sending.rate_limits import SendLimits, TelegramRateLimiter
from core.channels import bindings, directory, terminal
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.storage.home import Home, Lock
from tests.drill import lives
from tests.fakes.telegram import FakeTelegram, Person
from tests.fakes.telegram.people import message
from tests.fakes.telegram.server import TOKEN
from tests.support.database import write_now

PEOPLE = [Person(100 + n, f"P{n}") for n in range(5)]
POISONER = Person(190, "P")  # whom nobody stops
GROUPS = [-200 - n for n in range(3)]
FAST = Rate(1e6, 1e6)


def plan(seed: int, count: int) -> list[dict[str, Any]]:
    """The updates, as Telegram would write them; the same for the same seed."""
    draw, fake = random.Random(seed), FakeTelegram()
    made = []
    for n in range(count):
        person, kind = draw.choice(PEOPLE), draw.random()
        group = kind > 0.7
        chat = fake.chat(draw.choice(GROUPS), "supergroup") if group else fake.chat(person.id)
        name = "@acme_bot " if group else ""
        if n == count // 2:
            made.append({"message": message(fake.chat(POISONER.id), POISONER, 10_000 + n, lives.POISON)})
            continue
        if kind < 0.03:
            made.append({"stopped_message_generation": {"chat": chat.json(), "draft_id": 1}})
            continue
        if kind < 0.07:
            text = "/usage"
        elif kind < 0.10:
            text = f"question {n} long"
        else:
            text = f"{name}question {n} " + "word " * draw.randrange(1, 12)
        made.append({"message": message(chat, person, 10_000 + n, text.strip())})
    return [{"update_id": n + 1} | update for n, update in enumerate(made)]


# --- the platform's process ---


async def stand(updates: list[dict[str, Any]], seed: int, port: Path) -> None:
    """Serve until killed. `/more/N` puts the updates up to N into the queue; `/state` tells what is held."""
    draw, there, given = random.Random(seed), FakeTelegram(), 0
    for person in (*PEOPLE, POISONER):
        there.chat(person.id)
    for group in GROUPS:
        there.chat(group, "supergroup")

    async def more(request: web.Request) -> web.Response:
        nonlocal given
        upto = int(request.match_info["upto"])
        fresh = updates[given:upto]
        given = max(given, upto)
        for at in range(len(fresh) - 1):  # neighbours change places
            if draw.random() < 0.1:
                fresh[at], fresh[at + 1] = fresh[at + 1], fresh[at]
        again = [draw.choice(updates[:given]) for _ in range(len(fresh) // 10)]  # and some come twice
        there.account.pending += [*fresh, *again]
        there.account.came.set()
        return web.Response(text=str(len(there.account.pending)))

    async def state(request: web.Request) -> web.Response:
        held = [
            {"chat": one.chat, "id": one.id, "text": one.text, "texts": one.texts[:3], "labels": one.labels}
            for one in there.messages.values()
        ]
        told = {"pending": len(there.account.pending), "held": held, "violations": there.violations}
        return web.json_response(told | {"drafts": len(there.drafted), "calls": len(there.calls)})

    async with there.open():
        await lives.serve_controls(there.url, {"/more/{upto}": more, "/state": state}, port)


# --- the program's process ---


def prepare(home: Home) -> None:
    with Lock(home), Database(home.database, Cipher.open(home.key_file, create=True)) as database:

        def work(tx: Tx) -> None:
            terminal.ensure_terminal(tx, "home")
            channel = directory.create_channel(tx, "drill", title="Drill")
            tx.run("UPDATE channel SET per_minute = 0, per_hour = 0, tokens_in = 0, tokens_out = 9999")
            tx.run("UPDATE price SET in_nano = 150, out_nano = 601, share_bps = 3333")
            bindings.bind(tx, "telegram", "acme_bot", "", channel.id)

        write_now(database, work)


async def live(home: Home, url: str, transport: str = "draft", *, to_the_end: bool) -> None:
    bot = TelegramBot.configure({"token": TOKEN, "api": url, "transport": transport})
    bot._limiter = TelegramRateLimiter(SendLimits(FAST, FAST, FAST, FAST))
    await lives.run_bot(home, bot, "acme_bot", to_the_end=to_the_end)


# --- the check ---


def audit(tx: Tx, state: lives.Report, updates: list[dict[str, Any]]) -> tuple[list[str], dict[str, int]]:
    """What Telegram holds against what the books say, after all is settled."""
    held = {(one["chat"], one["id"]): one for one in state["held"]}
    problems, outcomes, booked = lives.audit_books(
        tx,
        held,
        lambda row: (updates[int(row["update_key"]) - 1].get("message") or {}).get("text", ""),
        lambda receipt: (receipt["chat"], receipt["message"]),
    )
    taken = {int(row["update_key"]) for row in tx.all("SELECT update_key FROM inbox")}
    if taken != {update["update_id"] for update in updates}:
        problems.append(f"{len(updates) - len(taken)} updates are not in the inbox")
    for place, one in held.items():
        if place not in booked and not one["text"].endswith("…") and not _is_refusal(tx, place):
            problems.append(f"{place} is final but in no book: {one['text'][:60]!r}")
    problems += [f"{state['pending']} updates were never confirmed"] if state["pending"] else []
    return [*state["violations"], *problems], dict(outcomes)


def _is_refusal(tx: Tx, place: tuple[int, int]) -> bool:
    """Whether a refusal was written there: it has a handle, and no receipt."""
    return bool(
        tx.value(
            "SELECT 1 FROM part JOIN delivery ON delivery.id = delivery_id WHERE delivery.state = 'failed'"
            " AND json_extract(handle, '$.chat') = ? AND json_extract(handle, '$.message') = ?",
            [*place],
        )
    )


def drill(count: int, kills: int, seed: int, folder: Path) -> lives.Report:
    home, port = Home(folder / "home"), folder / "port"
    home.create()
    prepare(home)
    updates = plan(seed, count)
    began = time.monotonic()
    with lives.forked_platform(lambda: stand(updates, seed, port), port) as (url, controls):

        def start(draw: random.Random, to_the_end: bool) -> int:
            transport = "draft" if to_the_end else draw.choice(("draft", "draft", "edit"))
            return lives.fork(lambda: live(home, url, transport, to_the_end=to_the_end))

        problems, died = lives.drill_bot(home, seed, count, kills, controls, start, folder)
        state = json.loads(lives.get(f"{controls}/state"))
    with lives.opened(home.database, Cipher.open(home.key_file, create=False)) as tx:
        found, outcomes = audit(tx, state, updates)
    return {
        "updates": count,
        "kills": died,
        "outcomes": outcomes,
        "drafts": state["drafts"],
        "requests": state["calls"],
        "violations": problems + found,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
    }


if __name__ == "__main__":
    lives.main("updates", drill, live, __doc__)
