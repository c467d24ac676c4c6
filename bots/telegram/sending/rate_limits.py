"""How fast one account may write: per chat, for the whole bot, and never before a `retry_after`. Knows no method.

Telegram's limits: about one message a second in a chat, 20 a minute in a group, 30 a second for the bot
(https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this). Edits count; so do drafts, here.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_MAX_CHATS = 10_000


@dataclass(frozen=True, slots=True)
class TelegramRate:
    """So many a second, and so many at once after a pause. In any span of t seconds: at most burst + per_s * t."""

    per_s: float
    burst: float


@dataclass(frozen=True, slots=True)
class SendLimits:
    private: TelegramRate = TelegramRate(0.9, 3)
    group: TelegramRate = TelegramRate(16 / 60, 4)
    draft: TelegramRate = TelegramRate(2.0, 2)
    bot: TelegramRate = TelegramRate(25.0, 5)


class TelegramBucket:
    """Tokens that come back with time."""

    __slots__ = ("_at", "_rate", "_tokens")

    def __init__(self, rate: TelegramRate, now: float) -> None:
        self._rate, self._tokens, self._at = rate, rate.burst, now

    def wait_s(self, now: float, spare: float = 0.0) -> float:
        """Seconds until there is one token above `spare`."""
        self._fill(now)
        lacking = min(1.0 + spare, self._rate.burst) - self._tokens
        return 0.0 if lacking <= 1e-9 else lacking / self._rate.per_s

    def take(self, now: float) -> None:
        self._fill(now)
        self._tokens -= 1.0

    def _fill(self, now: float) -> None:
        self._tokens = min(self._rate.burst, self._tokens + (now - self._at) * self._rate.per_s)
        self._at = now


class TelegramRateLimiter:
    """`wait_s` asks, `take` books, `turn` does both. What is only shown leaves room for what is final."""

    def __init__(self, limits: SendLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or SendLimits()
        self._clock = clock
        self._bot = TelegramBucket(self._limits.bot, clock())
        self._chats: OrderedDict[tuple[int, bool], TelegramBucket] = OrderedDict()
        self._blocked: dict[int, float] = {}
        self._blocked_all = 0.0

    def wait_s(self, chat: int, *, draft: bool = False, show: bool = False) -> float:
        """Seconds until this chat may be written to. With `show` one that leaves a place for what is final."""
        now = self._clock()
        return max(
            self._blocked.get(chat, 0.0) - now,
            self._blocked_all - now,
            self._chat(chat, draft, now).wait_s(now, 1.0 if show and not draft else 0.0),
            self._bot.wait_s(now, 2.0 if show else 0.0),
            0.0,
        )

    def take(self, chat: int, *, draft: bool = False) -> None:
        now = self._clock()
        self._chat(chat, draft, now).take(now)
        self._bot.take(now)

    async def turn(self, chat: int) -> None:
        """Wait until a message may be written there, and book it."""
        wait_s = self.wait_s(chat)
        while wait_s > 0:
            await asyncio.sleep(wait_s)
            wait_s = self.wait_s(chat)
        self.take(chat)

    def refused(self, chat: int, retry_after_s: float) -> None:
        """Telegram said 429: nothing goes to this chat before that time. Where two chats are refused, it is the bot."""
        now = self._clock()
        until = now + retry_after_s
        others = [end for other, end in self._blocked.items() if other != chat and end > now]
        self._blocked[chat] = max(until, self._blocked.get(chat, 0.0))
        if others:
            self._blocked_all = max(self._blocked_all, until, *others)
        if len(self._blocked) > _MAX_CHATS:
            self._blocked = {one: end for one, end in self._blocked.items() if end > now}

    def blocked(self, chat: int) -> bool:
        return max(self._blocked.get(chat, 0.0), self._blocked_all) > self._clock()

    def _chat(self, chat: int, draft: bool, now: float) -> TelegramBucket:
        key = (chat, draft)
        found = self._chats.get(key)
        if found is None:
            limits = self._limits
            found = self._chats[key] = TelegramBucket(
                limits.draft if draft else limits.private if chat > 0 else limits.group, now
            )
            if len(self._chats) > _MAX_CHATS:
                self._chats.popitem(last=False)
        self._chats.move_to_end(key)
        return found
