"""The engine protocol: submit a request, get a stream of events. Knows no torch, no chats, no SQLite.

    async with engine:                              # loads; leaving it drains
        generation = engine.submit(request)         # returns at once; never blocks the event loop
        async for event in generation: ...          # Started, Delta*, Finished
        generation.cancel()                         # takes effect within one step; Finished still comes, with usage

Errors are raised out of the iteration, as core.errors types: BadInput, PromptTooLong, Overloaded, AdapterUnusable,
OutOfMemory, EngineError. Failure of one request never harms another.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from core.config.sections import MAX_DEADLINE_S
from core.errors import BadInput
from core.types import AdapterRef, Message, Sampling, TokenUsage


class FinishReason(StrEnum):
    END = "end"  # the model ended its turn
    STOP = "stop"  # a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Scope:
    """Who a request runs for. Fairness counts by partner, channel, user; nothing cached is shared across channels.

    `conversation` keys what may be reused on its next turn; `Engine.forget` drops it. A partner of weight 2 is served
    twice as much as one of weight 1 while both wait.
    """

    partner: str = ""
    channel: str = ""
    user: str = ""
    conversation: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. Messages are rendered by the chat template; the oldest turns are dropped to fit.

    adapter None is the bare base model. `max_prompt_tokens` bounds the rendered prompt (0: the model's context).
    `deadline_s` is counted from submit, MAX_DEADLINE_S at most; what exists by then is the answer, Finished(DEADLINE).
    """

    id: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: AdapterRef | None = None
    scope: Scope = field(default_factory=Scope)
    max_prompt_tokens: int = 0
    deadline_s: float = 120.0


def check_request(request: Request) -> None:
    """Raise BadInput for numbers that no engine can draw by, NaN among them."""
    sampling = request.sampling
    rules = {
        "temperature": 0 <= sampling.temperature < math.inf,
        "top_p": 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k >= 0,
        "min_p": 0 <= sampling.min_p <= 1,
        "repetition_penalty": 0.01 <= sampling.repetition_penalty <= 100,
        "max_tokens": sampling.max_tokens >= 1,
        "deadline_s": 0 <= request.deadline_s <= MAX_DEADLINE_S,
    }
    if wrong := [name for name, right in rules.items() if not right]:
        raise BadInput(detail=f"the engine cannot use this {', '.join(wrong)}")


def prompt_limit(request: Request, context: int) -> int:
    """Tokens that the prompt may have: max_tokens are left to the answer, of at most half the context."""
    limit = context - min(request.sampling.max_tokens, context // 2)
    return min(limit, request.max_prompt_tokens or limit)


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is rendered and the request has a row. `dropped` counts the oldest messages left out to fit."""

    prompt_tokens: int
    reused_tokens: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that was added since the last event. Whole characters only; never part of a stop string."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason
    usage: TokenUsage


Event = Started | Delta | Finished


class Generation(Protocol):
    """One running request. Leaving the iteration early does not cancel it: call cancel()."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is loaded. `fingerprint` identifies the base model's weights: adapters trained on another are refused.

    `folder` is where the weights lie, for a trainer on this machine; `device` is where they run ("cpu", "cuda:0"), or
    would run here if they run on another machine.
    """

    model: str
    fingerprint: str
    description: str  # for people: "CPU, 2 threads, fp32"
    context: int
    folder: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long something took, many times: counts[i] times up to bounds[i] seconds, the last count above all bounds."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total_s: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What runs now, and totals since the start. What an engine cannot know of the machine that it uses stays zero."""

    running: int = 0
    waiting: int = 0
    resident_adapters: int = 0  # that rows run with, or could at once
    adapters_in_memory: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0  # taken in, without those reused
    reused_tokens: int = 0
    ended: Mapping[str, int] = field(default_factory=dict)  # requests, by FinishReason or the error's class
    waited_s: Histogram = field(default_factory=Histogram)  # from submit to a row
    first_token_s: Histogram = field(default_factory=Histogram)  # from submit
    inter_token_s: Histogram = field(default_factory=Histogram)  # between two tokens of a row
    positions_read: int = 0  # of keys and values, once per row and pass
    positions_held: int = 0  # of these, such as hold a token of their row
    decode_s: float = 0.0  # in passes that take one token of each row
    decode_bytes: int = 0  # that such passes cannot do without: weights, adapters, keys and values held
    bandwidth: float = 0.0  # bytes/s, measured at load

    @property
    def padding_waste(self) -> float:
        """Share of the keys and values read that no row needed: rows are read up to the longest, rounded up."""
        return 1 - self.positions_held / self.positions_read if self.positions_read else 0.0

    @property
    def roofline_fraction(self) -> float:
        """How near decoding comes to the bandwidth floor: 1 is memory read once at full speed, and nothing else."""
        return self.decode_bytes / self.bandwidth / self.decode_s if self.bandwidth and self.decode_s else 0.0


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    def submit(self, request: Request) -> Generation: ...

    async def forget(self, channel: str, conversation: str = "") -> None:
        """Drop all that is kept of a conversation (of all of the channel's, if none is named) from memory."""
        ...

    def stats(self) -> EngineStats: ...

    async def drain(self, deadline_s: float) -> None:
        """Take no more; finish what runs within the deadline, then cancel the rest."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
