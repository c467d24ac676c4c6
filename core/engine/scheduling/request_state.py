"""State of one request in the local engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from core.engine.lora.adapter_files import AdapterWeights
from core.engine.protocol import Request
from core.engine.scheduling.detokenizer import Detokenizer, StopScanner
from core.types import TokenUsage


class RequestPhase(Enum):
    WAITING = 1  # in the scheduler
    PREPARING = 2  # being rendered
    READING = 3  # rendered, but its adapter is being read
    READY = 4
    RUNNING = 5  # has a row
    ENDED = 6


@dataclass(eq=False, slots=True)
class RequestState:
    """One request on its way through the engine. The queue writes it under its lock until it is ready, then the model
    thread; `cancelled` any thread."""

    request: Request
    deadline: float  # time.monotonic()
    detokenizer: Detokenizer
    scanner: StopScanner
    submitted: float = field(default_factory=time.monotonic)
    phase: RequestPhase = RequestPhase.WAITING
    cancelled: bool = False
    prompt: tuple[int, ...] = ()
    dropped: int = 0
    computed: int = 0  # tokens of prompt and answer in the cache
    reused: int = 0  # of the prompt's, those that an earlier turn left
    answer: list[int] = field(default_factory=list)
    last_token: float | None = None  # time.monotonic()
    adapter: AdapterWeights | None = None
    slot: int | None = None
    adapter_bytes: int = 0
    urgent: bool = False  # another row makes room for it
    bypassed: int = 0  # how many went before it because their adapter had a slot
    admitted: float | None = None  # when it last got a row
    row_s: float = 0.0  # in rows before that: it may be paused
    started: bool = False  # the reader knows

    @property
    def uncomputed(self) -> int:
        """Tokens to take in before the next one is drawn. One: it steps with the others; none: it has just been run."""
        return len(self.prompt) + len(self.answer) - self.computed

    def next_ids(self, count: int) -> Sequence[int]:
        """At most `count` of the tokens to take in."""
        if self.computed >= len(self.prompt):
            start = self.computed - len(self.prompt)
            return self.answer[start : start + count]
        ids = self.prompt[self.computed : self.computed + count]
        return ids if len(ids) == count else (*ids, *self.answer[: count - len(ids)])

    def mark_computed(self, count: int) -> int:
        """So many were taken in; how many of them were the prompt's."""
        before, self.computed = self.computed, self.computed + count
        return max(0, min(self.computed, len(self.prompt)) - before)

    @property
    def adapter_sha256(self) -> str:
        return "" if self.adapter is None else self.adapter.sha256

    @property
    def usage(self) -> TokenUsage:
        return TokenUsage(len(self.prompt), len(self.answer), self.reused)
