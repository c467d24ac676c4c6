"""A whole program that speaks Slack: real core, scripted engine, real Bolt and slack_sdk, fake Slack on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bots.shared.rate_limits import Rate
from bots.slack.bot import SlackBot
from bots.slack.sending.rate_limits import SlackRateLimiter
from bots.slack.web import EVENTS
from core.channels import bindings, directory, operators, training_permission
from core.engine.protocol import Request
from core.errors import AppError
from core.storage.database import Tx
from tests.fakes.slack import FakeSlack, Held
from tests.fakes.slack.held import APP_TOKEN, SIGNING
from tests.support.running_service import RunningService, running_service
from tests.support.waiting import DEADLINE_S

FAST = Rate(1000.0, 1000.0)
METHODS = ("auth.test", "chat.startStream", "chat.stopStream", "chat.appendStream", "chat.update", "chat.postMessage")


def fast() -> SlackRateLimiter:
    return SlackRateLimiter(dict.fromkeys(METHODS, FAST))


@dataclass
class Talk:
    """`there` is the fake Slack, `here` the core."""

    there: FakeSlack
    here: RunningService
    bot: SlackBot
    teams: tuple[str, ...] = ("T1",)

    async def ask(self, user: str, text: str, **more: Any) -> Held:
        """Say something and wait for what the bot's message becomes in the end; a command by the slash command."""
        if text[:1] == "/" and not more:
            return await self.answer(self.there.command(user, text[1:], channel=f"D{user}"))
        return await self.answer(self.there.message(user, text, **more))

    async def home(self, user: str, **more: Any) -> dict[str, Any]:
        """Open the home; what it shows then."""
        published = len(self.there.called("views.publish"))
        await self.there.deliver(self.there.opens_home(user, **more))
        await self.there.until(lambda: len(self.there.called("views.publish")) > published)
        return self.there.homes[more.get("team", "T1"), user]

    async def modal(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Do something that opens a modal."""
        opened = len(self.there.views)
        await self.there.deliver(payload)
        await self.there.until(lambda: len(self.there.views) > opened)
        return self.there.views[-1]

    async def answer(self, payload: dict[str, Any]) -> Held:
        before = len(self.there.messages)
        await self.there.deliver(payload)
        await self.settled()
        return list(self.there.messages.values())[before]

    async def until_true(self, asked: Callable[[Tx], bool]) -> None:
        """Until the core's rows say so."""
        async with asyncio.timeout(DEADLINE_S):
            while not await self.here.database.read(asked):  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0.01)

    async def until_known(self, user: str, team: str = "T1") -> None:
        """Until the bot has found out how to speak to somebody."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.bot_languages(team).get(user, ("", ""))[1]:  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0.01)

    async def until_session(self, status: str) -> None:
        """Until Slack has been told that of every agent session."""
        await self.there.until(lambda: self.there.statuses and set(self.there.statuses.values()) == {status})

    def bot_languages(self, team: str) -> dict[str, tuple[str, str]]:
        """What the bot has found out of the people of a workspace."""
        assert self.bot.workspaces is not None
        found = self.bot.workspaces.get(team)
        return dict(found.languages) if found else {}

    async def settled(self, seconds: float = DEADLINE_S) -> None:
        async with asyncio.timeout(seconds):
            for team in self.teams:
                await self.here.service.settled("slack", team)


def bind(tx: Tx) -> None:
    channel = directory.channel_by_name(tx, "acme")
    assert channel is not None
    bindings.bind(tx, "slack", "T1", "", channel.id)
    training_permission.declare(tx, "slack", allowed=SlackBot.training_allowed)
    tx.run("UPDATE channel SET per_minute = 0, per_hour = 0 WHERE id = ?", [channel.id])
    owner = tx.cipher.hash_user("slack", "T1", "UOWNER")
    operators.grant(tx, owner, None, "owner", "test")


@asynccontextmanager
async def talk(
    folder: Path,
    answers: Callable[[Request], str | AppError] | None = None,
    *,
    there: FakeSlack | None = None,
    http: bool = False,
    delay_s: float = 0.0,
    pace: Callable[[], SlackRateLimiter] = fast,
    trainer: tuple[str, ...] = (),
    **settings: Any,
) -> AsyncIterator[Talk]:
    async with contextlib.AsyncExitStack() as stack:
        if there is None:
            there = await stack.enter_async_context(FakeSlack().open())
            there.workspace("T1")
        here = await stack.enter_async_context(running_service(folder, answers, delay_s=delay_s, trainer=trainer))
        await here.database.write(bind)
        given: dict[str, Any] = {"api": f"{there.url}/api/", "listen": "127.0.0.1:0"}
        if "client_id" not in settings and "token" not in settings:
            given["token"] = there.workspaces["T1"].token
        given |= {"signing_secret": SIGNING} if http else {"app_token": APP_TOKEN}
        bot = SlackBot.configure(given | settings)
        bot._limiter = pace
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(bot.run(here.service))
            if http:
                while bot.web is None or bot.web._runner is None or not bot.web._runner.addresses:  # noqa: ASYNC110 - the port is known when it listens
                    await asyncio.sleep(0.005)
                there.events_url = f"http://127.0.0.1:{bot.web.port}{EVENTS}"
            else:
                there.events_url = ""
                await there.until(lambda: there.sockets)
            try:
                yield Talk(there, here, bot)
            finally:
                running.cancel()
