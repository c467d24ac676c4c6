"""The retry policy of everything that is written to a platform.

- A sink makes one attempt. It may wait for what its platform demands (Retry-After), and for nothing else.
- `deliver` repeats a failed attempt, whose outcome is unknown, after 0.5 s, doubling up to 15 s. All attempts together
  have 10 minutes, time inside the sink included; then the delivery has failed. `Unreachable` fails at once.
- The job worker makes one attempt a turn and postpones the job for about as long, so that other jobs come first.
- A storage that cannot write (disk full, queue full) is no failure of the platform: `wait_for_storage`, the outer
  loop, repeats the whole step every 2 s without a bound, since an accepted message must be answered.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from core.errors import AppError, Overloaded, StorageError, StorageRefused, StoredUnreadable
from core.platform import Unreachable

T = TypeVar("T")
log = logging.getLogger(__name__)
BOUND_S = 600.0
STORAGE_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0


class DeliveryFailed(AppError):
    """The platform did not take a message within the bound, or never will."""


async def deliver(
    attempt: Callable[[], Awaitable[T]],
    *,
    bound_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """Repeat `attempt` until it succeeds. Raises DeliveryFailed, or what `wait_for_storage` waits for."""
    end = clock() + (BOUND_S if bound_s is None else bound_s)
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            async with asyncio.timeout(max(0.0, end - clock())):
                return await attempt()
        except Unreachable as error:
            raise DeliveryFailed(detail="unreachable") from error
        except Exception as error:  # any failure of a bot or platform: outcome unknown, so the same again
            if is_storage_unavailable(error):
                raise
            log.warning("delivery.failed", extra={"error": type(error).__name__}, exc_info=True)
            if clock() + pause_s >= end:
                raise DeliveryFailed(detail=type(error).__name__) from error
        await sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def wait_for_storage(step: Callable[[], Awaitable[T]]) -> T:
    """Repeat `step` until the storage can write."""
    while True:
        try:
            return await step()
        except (StorageError, Overloaded) as error:
            if not is_storage_unavailable(error):
                raise
            log.error("storage.unavailable", extra={"error": str(error)})
            await asyncio.sleep(STORAGE_S)


def is_storage_unavailable(error: Exception) -> bool:
    """Whether the storage cannot write at the moment; a refused statement or an unreadable text does not pass."""
    return isinstance(error, StorageError | Overloaded) and not isinstance(error, StorageRefused | StoredUnreadable)
