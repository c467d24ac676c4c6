"""Shows a growing text, one call at a time: what grows faster than the platform takes it is coalesced."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)
_SHOW_S = 10.0


class LiveView:
    """`add` text while `run` runs; `end` stops it. Showing is best effort: errors are logged."""

    def __init__(self, show: Callable[[str], Awaitable[None]]) -> None:
        self.text = ""
        self._show = show
        self._shown = 0
        self._grown = asyncio.Event()
        self._ended = False

    def add(self, text: str) -> None:
        self.text += text
        self._grown.set()

    def end(self) -> None:
        self._ended = True
        self._grown.set()

    async def run(self) -> None:
        while not self._ended:
            await self._grown.wait()
            self._grown.clear()
            if len(self.text) > self._shown and not self._ended:
                self._shown = len(self.text)
                await show_once(lambda: self._show(self.text))


async def show_once(show: Callable[[], Awaitable[None]]) -> None:
    """Show something that is not final, for 10 s at most."""
    try:
        async with asyncio.timeout(_SHOW_S):
            await show()
    except Exception as error:  # the final text is delivered all the same
        log.warning("delivery.show_failed", extra={"error": type(error).__name__})
