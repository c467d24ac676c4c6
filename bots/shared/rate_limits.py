"""Token bucket for the rate limits of a platform."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """`burst` calls at once, then `per_s` a second. In any span of t seconds at most burst + per_s * t."""

    per_s: float
    burst: float


class TokenBucket:
    """Tokens of one rate. All times are of the caller's monotonic clock, in seconds."""

    __slots__ = ("_at", "_rate", "_tokens")

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate, self._tokens, self._at = rate, rate.burst, now

    def wait_s(self, now: float, spare: float = 0.0) -> float:
        """Seconds until there is one token above `spare`; 0 is now."""
        self._fill(now)
        lacking = min(1.0 + spare, self._rate.burst) - self._tokens
        return 0.0 if lacking <= 1e-9 else lacking / self._rate.per_s

    def take(self, now: float) -> None:
        self._fill(now)
        self._tokens -= 1.0

    def _fill(self, now: float) -> None:
        self._tokens = min(self._rate.burst, self._tokens + (now - self._at) * self._rate.per_s)
        self._at = now
