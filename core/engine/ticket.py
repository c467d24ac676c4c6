"""What is known of one request on its way through the engine. Knows no threads, no tensors of rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from core.engine.adapter_files import AdapterWeights
from core.engine.protocol import Request
from core.engine.text import Detokenizer, StopScanner
from core.types import Usage


class State(Enum):
    WAITING = 1  # in the scheduler
    PREPARING = 2  # being rendered, its adapter being read
    READY = 3
    RUNNING = 4  # has a row
    ENDED = 5


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way through the engine. Only the model thread writes it, but for `cancelled`."""

    request: Request
    deadline: float  # time.monotonic()
    detokenizer: Detokenizer
    scanner: StopScanner
    submitted: float = field(default_factory=time.monotonic)
    state: State = State.WAITING
    cancelled: bool = False
    prompt: tuple[int, ...] = ()
    dropped: int = 0
    filled: int = 0  # prompt tokens in the cache
    reused: int = 0  # of these, those that an earlier turn left
    answer: list[int] = field(default_factory=list)
    last_token: float | None = None  # time.monotonic()
    adapter: AdapterWeights | None = None
    slot: int | None = None
    adapter_bytes: int = 0

    @property
    def past_prompt(self) -> bool:
        return self.filled == len(self.prompt)

    @property
    def adapter_sha256(self) -> str:
        return "" if self.adapter is None else self.adapter.sha256

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), len(self.answer), self.reused)
