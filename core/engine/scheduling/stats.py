"""Counters of a running engine. Any thread may read them.

`end` is called on the event loop, everything else by the thread that produces tokens.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from core.engine.protocol import EngineStats, FinishReason, Histogram

WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class TimeHistogram:
    """Counts durations in buckets."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.total_s = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds

    def snapshot(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total_s)


@dataclass(slots=True)
class StatsCounter:
    """Totals since the start, with the fields of EngineStats."""

    generated_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    waited: TimeHistogram = field(default_factory=lambda: TimeHistogram(WAITS_S))
    first_token: TimeHistogram = field(default_factory=lambda: TimeHistogram(WAITS_S))
    inter_token: TimeHistogram = field(default_factory=lambda: TimeHistogram(GAPS_S))
    decode_s: float = 0.0
    decode_bytes: int = 0

    def token(self, since_submit_s: float, since_last_s: float | None) -> None:
        """Count one token of a request; `since_last_s` is None for its first."""
        self.generated_tokens += 1
        if since_last_s is None:
            self.first_token.add(since_submit_s)
        else:
            self.inter_token.add(since_last_s)

    def end(self, outcome: FinishReason | Exception) -> None:
        """Count an ended request."""
        self.ended[outcome.value if isinstance(outcome, FinishReason) else type(outcome).__name__] += 1

    def stats(self) -> EngineStats:
        """The totals; the engine adds its current load."""
        spans = {f"{name}_s": getattr(self, name).snapshot() for name in ("waited", "first_token", "inter_token")}
        counts = ("generated_tokens", "prompt_tokens", "reused_tokens", "decode_s", "decode_bytes")
        return EngineStats(ended=self.ended.copy(), **spans, **{name: getattr(self, name) for name in counts})
