"""Rate limits of the Web API for one workspace.

Tiers are per method, workspace and app; chat.postMessage is about one a second for each channel.
"""

import time
from collections.abc import Callable, Mapping

from cachetools import LRUCache

from bots.shared.rate_limits import Rate, TokenBucket


def _tier(per_minute: float) -> Rate:
    return Rate(per_minute / 60, per_minute / 4)


RATES: Mapping[str, Rate] = {
    "chat.startStream": _tier(20),
    "chat.stopStream": _tier(20),
    "chat.appendStream": _tier(100),
    "chat.update": _tier(50),
    "chat.postMessage": Rate(1.0, 3.0),
    "users.info": _tier(100),
}
_OTHER = _tier(50)
_PER_CHANNEL = ("chat.postMessage",)
_MAX_BUCKETS = 5_000


class SlackRateLimiter:
    """Rate limits of one workspace."""

    def __init__(self, rates: Mapping[str, Rate] = RATES, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates, self._clock = rates, clock
        self._buckets: LRUCache[str, TokenBucket] = LRUCache(_MAX_BUCKETS)
        self._closed_until: LRUCache[str, float] = LRUCache(_MAX_BUCKETS)

    def wait_s(self, method: str, channel: str = "") -> float:
        """Seconds until this call is allowed; 0 is now."""
        key, now = _key(method, channel), self._clock()
        return max(self._closed_until.get(key, 0.0) - now, self._bucket(key, method, now).wait_s(now), 0.0)

    def take(self, method: str, channel: str = "") -> None:
        now = self._clock()
        self._bucket(_key(method, channel), method, now).take(now)

    def refused(self, method: str, channel: str, retry_after_s: float) -> None:
        """Slack answered 429: no call of this kind before `retry_after_s` have passed."""
        key = _key(method, channel)
        self._closed_until[key] = max(self._closed_until.get(key, 0.0), self._clock() + retry_after_s)

    def _bucket(self, key: str, method: str, now: float) -> TokenBucket:
        return self._buckets.setdefault(key, TokenBucket(self._rates.get(method, _OTHER), now))


def _key(method: str, channel: str) -> str:
    return f"{method} {channel}" if method in _PER_CHANNEL else method
