"""First messages of replies, whose responses may be lost."""

from collections.abc import Awaitable, Callable, Hashable
from typing import TypeVar

from cachetools import LRUCache

from bots.shared.errors import OutcomeUnknown
from core.platform import Unreachable

T = TypeVar("T")
_REMEMBERED = 2_000


class FirstMessages:
    """Sends a first message; after a lost response once more, when the platform answers again.

    So lost responses leave one message too many at most, as a crash at that point does.
    """

    def __init__(self) -> None:
        self.orphans = 0
        self._lost: LRUCache[Hashable, int] = LRUCache(_REMEMBERED)  # responses lost in a row

    async def first(self, to: Hashable, reach: Callable[[], Awaitable[object]], send: Callable[[], Awaitable[T]]) -> T:
        """Raises OutcomeUnknown for the first lost response, which the caller repeats, and Unreachable for the second.

        `reach` returns once the platform answers.
        """
        if self._lost.get(to, 0) > 1:
            del self._lost[to]
            raise Unreachable(detail="two responses were lost")
        if to in self._lost:
            await reach()
        try:
            sent = await send()
        except OutcomeUnknown as error:
            if self.count_lost(to) > 1:
                raise Unreachable(detail="two responses were lost") from error
            raise
        self._lost.pop(to, None)
        return sent

    def count_lost(self, to: Hashable) -> int:
        """Count a first message that may be visible without a handle; the number of them in a row."""
        self.orphans += 1
        self._lost[to] = self._lost.get(to, 0) + 1
        return self._lost[to]
