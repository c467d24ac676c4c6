"""How often Slack lets one workspace call each method. Knows methods and their tiers; knows no message.

Tiers are per method, workspace and app; chat.postMessage is about one a second for each channel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlackRate:
    """`burst` calls at once, then `per_s` of them a second."""

    per_s: float
    burst: float


def _tier(per_minute: float) -> SlackRate:
    return SlackRate(per_minute / 60, per_minute / 4)


RATES: Mapping[str, SlackRate] = {
    "chat.startStream": _tier(20),
    "chat.stopStream": _tier(20),
    "chat.appendStream": _tier(100),
    "chat.update": _tier(50),
    "chat.postMessage": SlackRate(1.0, 3.0),
    "users.info": _tier(100),
}
_OTHER = _tier(50)
_PER_CHANNEL = ("chat.postMessage",)
_MOST = 5_000


@dataclass(slots=True)
class _SlackBucket:
    rate: SlackRate
    left: float
    at: float
    closed_until: float = 0.0


class SlackRateLimiter:
    """One workspace's."""

    def __init__(self, rates: Mapping[str, SlackRate] = RATES, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates, self._clock = rates, clock
        self._buckets: dict[str, _SlackBucket] = {}

    def wait_s(self, method: str, channel: str = "") -> float:
        """Seconds until this call is allowed; 0 is now."""
        bucket, now = self._bucket(method, channel), self._clock()
        bucket.left = min(bucket.rate.burst, bucket.left + (now - bucket.at) * bucket.rate.per_s)
        bucket.at = now
        return max(bucket.closed_until - now, (1 - bucket.left) / bucket.rate.per_s, 0.0)

    def take(self, method: str, channel: str = "") -> None:
        self._bucket(method, channel).left -= 1

    def refused(self, method: str, channel: str, retry_after_s: float) -> None:
        """Slack said 429: nothing of this kind before it says so."""
        bucket = self._bucket(method, channel)
        bucket.closed_until = max(bucket.closed_until, self._clock() + retry_after_s)

    def _bucket(self, method: str, channel: str) -> _SlackBucket:
        key = f"{method} {channel}" if method in _PER_CHANNEL else method
        found = self._buckets.get(key)
        if found is None:
            if len(self._buckets) >= _MOST:
                self._buckets.pop(next(one for one in self._buckets if " " in one))
            rate = self._rates.get(method, _OTHER)
            found = self._buckets[key] = _SlackBucket(rate, rate.burst, self._clock())
        return found
