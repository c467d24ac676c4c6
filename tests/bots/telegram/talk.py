"""A whole program that speaks Telegram: real core, scripted engine, real aiogram, fake Bot API on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from bots.shared.rate_limits import Rate
from bots.telegram.bot import TelegramBot
from bots.telegram.sending.rate_limits import SendLimits, TelegramRateLimiter
from bots.telegram.webhook import path_of
from core.channels import bindings, directory, operators
from core.engine.protocol import Request
from core.errors import AppError
from core.storage.database import Tx
from tests.fakes.telegram import FakeTelegram, Person, Sent
from tests.fakes.telegram.server import TOKEN
from tests.support.running_service import RunningService, running_service
from tests.support.waiting import DEADLINE_S

ANN = Person(11, "Ann")
LI = Person(12, "Li", "zh-hans")
OWNER = Person(13, "Owner")
SECRET = "a-secret-of-sixteen-or-more"
FAST = Rate(1000.0, 1000.0)


@dataclass
class Talk:
    """`there` is the fake Telegram, `here` the core."""

    there: FakeTelegram
    here: RunningService
    url: str = ""

    async def ask(self, person: Person, text: str = "", **more: Any) -> Sent:
        """Say something and wait for what the bot's message becomes in the end."""
        chat = more.get("chat")
        place = chat.id if chat else person.id
        before = len(self.there.held(place))
        self.there.says(person, text, **more)
        return await self.answer(place, before)

    async def answer(self, place: int, before: int) -> Sent:
        await self.there.until(lambda: len(self.there.held(place)) > before)
        await self.settled()
        return self.there.held(place)[before]

    async def press(self, person: Person, message: Sent, label: str = "", *, data: str = "") -> None:
        """Press a button, and wait until all that follows from it is done."""
        done = len(self.there.answered)
        self.there.presses(person, message, label, data=data)
        await self.there.until(lambda: len(self.there.answered) > done)
        await self.settled()

    async def settled(self, seconds: float = DEADLINE_S) -> None:
        """All that Telegram had is taken in, and all that was taken in is ended."""
        await self.there.until(lambda: not self.there.account.pending)
        async with asyncio.timeout(seconds):
            await self.here.service.settled("telegram", "acme_bot")


def bind(tx: Tx) -> None:
    channel = directory.channel_by_name(tx, "acme")
    assert channel is not None
    bindings.bind(tx, "telegram", "acme_bot", "", channel.id)
    tx.run("UPDATE channel SET per_minute = 0, per_hour = 0 WHERE id = ?", [channel.id])
    owner = tx.cipher.hash_user("telegram", "acme_bot", str(OWNER.id))
    operators.grant(tx, owner, None, "owner", "test")


@asynccontextmanager
async def talk(
    folder: Path,
    answers: Callable[[Request], str | AppError] | None = None,
    *,
    there: FakeTelegram | None = None,
    webhook: bool = False,
    delay_s: float = 0.0,
    pace: TelegramRateLimiter | None = None,
    trainer: tuple[str, ...] = (),
    **settings: Any,
) -> AsyncIterator[Talk]:
    async with contextlib.AsyncExitStack() as stack:
        if there is None:
            there = await stack.enter_async_context(FakeTelegram().open())
        here = await stack.enter_async_context(running_service(folder, answers, delay_s=delay_s, trainer=trainer))
        await here.database.write(bind)
        given = {"token": TOKEN, "api": there.url, **settings}
        if webhook:
            given |= {"webhook": "https://example.org/hook", "webhook_secret": SECRET, "listen": "127.0.0.1:0"}
        bot = TelegramBot.configure(given)
        bot._limiter = pace or TelegramRateLimiter(SendLimits(FAST, FAST, FAST, FAST))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(bot.run(here.service))
            made = Talk(there, here)
            poster = None
            if webhook:
                await there.until(lambda: there.account.webhook)
                made.url = f"http://127.0.0.1:{_port()}{path_of(SECRET)}"
                poster = tasks.create_task(_post(made))
            else:
                await there.until(
                    lambda: any(call.method == "getUpdates" for call in there.calls) or there.account.polling
                )
            try:
                yield made
            finally:
                if poster:
                    poster.cancel()
                running.cancel()


async def _post(made: Talk) -> None:
    """Telegram's side of a webhook."""
    async with ClientSession() as session:
        while True:
            while made.there.account.pending:
                await made.there.post_webhook(made.url, session)
            made.there.account.came.clear()
            await made.there.account.came.wait()


def _port() -> int:
    from bots.telegram import webhook

    (server,) = webhook._servers.values()
    assert server._runner is not None
    return int(server._runner.addresses[0][1])
