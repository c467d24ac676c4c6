"""The clock of a home: it never goes back, and a change of the system's time does not move it while a program runs.

Limits, retention and books depend on it: an hour back would renew limits, and a year ahead erase everything.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from core.errors import StorageError
from core.storage import state
from core.storage.database import Tx

log = logging.getLogger(__name__)
MOST_AHEAD_MS = 100 * 86_400_000  # since the home was last used
IS_RIGHT = "DISTRIBUTARY_CLOCK_IS_RIGHT"  # the variable that accepts a clock further ahead
_KEY = "clock"
_JUMP_MS = 60_000
_LOOK_S = 60.0


def steady_ns() -> int:
    """Nanoseconds that no change of the time moves; time in suspension counts where the system can tell."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """Milliseconds since 1970: the system's time at the start, and what has passed since."""

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns, passed_ns: Callable[[], int] = steady_ns) -> None:
        self._wall_ns, self._passed_ns = wall_ns, passed_ns
        self._base_ms = wall_ns() // 1_000_000 - passed_ns() // 1_000_000

    def __call__(self) -> int:
        return self._base_ms + self._passed_ns() // 1_000_000

    @property
    def off_ms(self) -> int:
        """How far the system's time is ahead of this clock."""
        return self._wall_ns() // 1_000_000 - self()

    def resume(self, tx: Tx, *, is_right: bool) -> None:
        """Go on from when the home was last used. Raises StorageError far beyond it, unless the time `is_right`."""
        ahead_ms = self() - last_used_ms(tx) if last_used_ms(tx) else 0
        if ahead_ms < 0:
            log.warning("clock.back", extra={"seconds": round(-ahead_ms / 1000)})
            self._base_ms -= ahead_ms
        elif ahead_ms > MOST_AHEAD_MS and not is_right:
            days = round(ahead_ms / 86_400_000)
            detail = f"the clock is {days} days after the last use of this home"
            raise StorageError("error.clock_ahead", detail, days=days, variable=f"{IS_RIGHT}=1")
        state.put(tx, _KEY, str(self()))

    async def watch(self) -> None:
        """Report each jump of the system's time, until cancelled."""
        known_ms = self.off_ms
        while True:
            await asyncio.sleep(_LOOK_S)
            if abs(self.off_ms - known_ms) > _JUMP_MS:
                log.warning("clock.jumped", extra={"seconds": round((self.off_ms - known_ms) / 1000)})
                known_ms = self.off_ms


def last_used_ms(tx: Tx) -> int:
    """When the home was last used; 0 for a new one."""
    return int(state.get(tx, _KEY) or 0)


def keep_time(tx: Tx) -> None:
    """Note that the home is in use now."""
    state.put(tx, _KEY, str(max(tx.now_ms, last_used_ms(tx))))
