"""Rate limits of one account: per chat, for the whole bot, and never before a `retry_after`.

Telegram's limits: about one message a second in a chat, 20 a minute in a group, 30 a second for the bot
(https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this). Edits and drafts count.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from bots.shared.rate_limits import Rate, TokenBucket

_MAX_CHATS = 10_000
_PRIVATE, _GROUP, _DRAFT, _BOT = Rate(0.9, 3), Rate(16 / 60, 4), Rate(2.0, 2), Rate(25.0, 5)


@dataclass(frozen=True, slots=True)
class SendLimits:
    private: Rate = _PRIVATE
    group: Rate = _GROUP
    draft: Rate = _DRAFT
    bot: Rate = _BOT


class TelegramRateLimiter:
    """`take` counts a call; `turn` waits and counts it. Drafts leave tokens for final messages."""

    def __init__(self, limits: SendLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits or SendLimits(), clock
        self._bot = TokenBucket(self._limits.bot, clock())
        self._chats: LRUCache[tuple[int, bool], TokenBucket] = LRUCache(_MAX_CHATS)
        self._blocked: dict[int, float] = {}
        self._blocked_all = 0.0

    def wait_s(self, chat: int, *, draft: bool = False, show: bool = False) -> float:
        """Seconds until this chat may be written to. `show`: leave a token for final messages."""
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
        """Wait until the chat may be written to, and count the call."""
        while (wait_s := self.wait_s(chat)) > 0:  # noqa: ASYNC110 - other callers may take the token meanwhile
            await asyncio.sleep(wait_s)
        self.take(chat)

    def refused(self, chat: int, retry_after_s: float) -> None:
        """Respect a 429 of this chat; when two chats are blocked, the whole bot waits."""
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

    def _chat(self, chat: int, draft: bool, now: float) -> TokenBucket:
        limits = self._limits
        rate = limits.draft if draft else limits.private if chat > 0 else limits.group
        return self._chats.setdefault((chat, draft), TokenBucket(rate, now))
