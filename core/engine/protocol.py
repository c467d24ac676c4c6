"""The engine protocol: submit a request, read a stream of events.

    async with engine:                              # loads; leaving it drains
        generation = engine.submit(request)         # returns at once; never blocks the event loop
        async for event in generation: ...          # Started, Delta*, Finished
        generation.cancel()                         # takes effect within one step; Finished still comes, with usage

The iteration raises core.errors: BadInput, PromptTooLong, Overloaded, AdapterUnusable, OutOfMemory, EngineError. A
failed request never harms another.
"""

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
    """Who a request runs for. Fairness counts by partner, channel and user; nothing cached is shared across channels.

    `conversation` keys what the next turn may reuse; `Engine.forget` drops it. While both wait, a partner of weight 2
    gets twice the tokens of one of weight 1.
    """

    partner: str = ""
    channel: str = ""
    user: str = ""
    conversation: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. Messages are rendered by the chat template; the oldest turns are dropped to fit.

    adapter None is the base model. `max_prompt_tokens` bounds the rendered prompt (0: the model's context).
    `deadline_s` counts from submit, at most MAX_DEADLINE_S; at the deadline the text so far is the answer,
    Finished(DEADLINE).
    """

    id: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: AdapterRef | None = None
    scope: Scope = field(default_factory=Scope)
    max_prompt_tokens: int = 0
    deadline_s: float = 120.0


def check_request(request: Request) -> None:
    """Raise BadInput for parameters that no engine can use, NaN among them."""
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
    """Maximum tokens of the prompt: the context less max_tokens, of which at most half the context is reserved."""
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
    """Text added since the last event: whole characters, never part of a stop string."""

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

    `folder` holds the weights for a trainer on this machine. `device` is where the model runs ("cpu", "cuda:0"), or
    where this machine would run it if the engine is remote.
    """

    model: str
    fingerprint: str
    description: str  # for people: "CPU, 2 threads, fp32"
    context: int
    folder: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations in buckets: counts[i] of at most bounds[i] seconds, the last count above all bounds."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total_s: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Current load and totals since the start. Fields that an engine cannot measure stay zero."""

    running: int = 0
    waiting: int = 0
    resident_adapters: int = 0  # in slots, ready for a row
    adapters_in_memory: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0  # computed; reused ones are not counted
    reused_tokens: int = 0
    ended: Mapping[str, int] = field(default_factory=dict)  # requests, by FinishReason or the error's class
    waited_s: Histogram = field(default_factory=Histogram)  # from submit to a row
    first_token_s: Histogram = field(default_factory=Histogram)  # from submit
    inter_token_s: Histogram = field(default_factory=Histogram)  # between two tokens of a row
    positions_read: int = 0  # keys read, per row and pass
    positions_held: int = 0  # of these, keys of the row's own tokens
    decode_s: float = 0.0  # time in passes of one token per row
    decode_bytes: int = 0  # minimum reads of those passes: weights, adapters, keys and values
    bandwidth: float = 0.0  # bytes/s, measured at load

    @property
    def padding_waste(self) -> float:
        """Share of the keys and values read that no row needed: rows are read up to the longest, rounded up."""
        return 1 - self.positions_held / self.positions_read if self.positions_read else 0.0

    @property
    def roofline_fraction(self) -> float:
        """Decoding speed as a fraction of the bandwidth bound: 1 means that memory is read once at full speed."""
        return self.decode_bytes / self.bandwidth / self.decode_s if self.bandwidth and self.decode_s else 0.0


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    def submit(self, request: Request) -> Generation: ...

    async def forget(self, channel: str, conversation: str = "") -> None:
        """Drop everything kept in memory of a conversation, or of all of the channel's if none is named."""

    def stats(self) -> EngineStats: ...

    async def drain(self, deadline_s: float) -> None:
        """Accept no more requests; finish running ones within the deadline, then cancel the rest."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
