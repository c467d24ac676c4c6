"""State of one request in the local engine."""

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
    PREPARING = 2  # its prompt is being rendered
    READING = 3  # its adapter is being read
    READY = 4
    RUNNING = 5  # has a row
    ENDED = 6


@dataclass(eq=False, slots=True)
class RequestState:
    """One request. The waiting queue writes it under its lock until it is ready, then the model thread; `cancelled` may
    be set by any thread.
    """

    request: Request
    deadline: float  # time.monotonic()
    detokenizer: Detokenizer
    scanner: StopScanner
    submitted: float = field(default_factory=time.monotonic)
    phase: RequestPhase = RequestPhase.WAITING
    cancelled: bool = False
    prompt: tuple[int, ...] = ()
    dropped: int = 0
    computed: int = 0  # tokens of prompt and answer in the KV cache
    reused: int = 0  # prompt tokens taken from the prefix cache
    answer: list[int] = field(default_factory=list)
    last_token: float | None = None  # time.monotonic()
    adapter: AdapterWeights | None = None
    slot: int | None = None
    adapter_bytes: int = 0
    urgent: bool = False  # another row is preempted for it
    bypassed: int = 0  # requests that passed it because their adapter had a slot
    admitted: float | None = None  # time.monotonic() of its row; None without one
    row_s: float = 0.0  # time in earlier rows, before preemptions
    started: bool = False  # Started has been emitted

    @property
    def uncomputed(self) -> int:
        """Tokens to compute before the next one is sampled: 1 in decoding, 0 right after a pass."""
        return len(self.prompt) + len(self.answer) - self.computed

    def next_ids(self, count: int) -> Sequence[int]:
        """At most `count` of the tokens to compute."""
        if self.computed >= len(self.prompt):
            start = self.computed - len(self.prompt)
            return self.answer[start : start + count]
        ids = self.prompt[self.computed : self.computed + count]
        return ids if len(ids) == count else (*ids, *self.answer[: count - len(ids)])

    def mark_computed(self, count: int) -> int:
        """Count tokens as computed; returns how many of them belong to the prompt."""
        before, self.computed = self.computed, self.computed + count
        return max(0, min(self.computed, len(self.prompt)) - before)

    @property
    def adapter_sha256(self) -> str:
        return "" if self.adapter is None else self.adapter.sha256

    @property
    def usage(self) -> TokenUsage:
        return TokenUsage(len(self.prompt), len(self.answer), self.reused)
