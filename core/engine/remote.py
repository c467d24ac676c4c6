"""The engine protocol over an OpenAI-compatible server: vLLM and what stands above it. Knows no HTTP and no chats.

Prompts are rendered here, by the base model's own tokenizer and template, and go as token ids: they are the very ones
that the local engine would run and that training saw. The model's id there is the adapter's sha256. Fairness and bounds
hold in front of the server: at most `max_rows` requests are with it, the others wait in core.engine.scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from core.demo import Progress
from core.engine.handshake import meet
from core.engine.openai import NotThere, Refused, Server
from core.engine.protocol import (
    Delta,
    EngineInfo,
    EngineStats,
    Finished,
    FinishReason,
    ModelSettings,
    RemoteSettings,
    Request,
    Started,
    check,
    prompt_limit,
)
from core.engine.scheduler import COMPLETION_COST, PROMPT_COST, QueueFull, Scheduler
from core.engine.stream import EventStream
from core.engine.tally import Tally
from core.engine.text import StopScanner
from core.engine.wire import Ask, Chunk
from core.errors import AdapterUnusable, AppError, EngineError, ModelLoadFailed, Overloaded, PromptTooLong
from core.model import read_model
from core.prompt import Rendered, render
from core.types import AdapterRef, Usage

log = logging.getLogger(__name__)

DRAIN_S = 10.0  # when the engine is left without an error
FIRST_GUESS_S = 10.0  # of how long one request takes, before any has been seen
SALTS = 10_000  # conversations whose prefixes can be found again at the server
LOADS = 2  # times an adapter is loaded for one request: behind a router another replica may get the next call
TOO_LONG = ("context length", "max_model_len")


@dataclass(eq=False, slots=True)
class _Job:
    """One request on its way. `task` is there while the server has it."""

    request: Request
    generation: RemoteGeneration
    scanner: StopScanner
    submitted: float = field(default_factory=time.monotonic)
    task: asyncio.Task[FinishReason | AppError] | None = None
    timer: asyncio.TimerHandle | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    uncounted: str = ""  # text since the server's last count
    last_token: float | None = None
    over: bool = False

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


class RemoteGeneration(EventStream):
    """The events of one request; cancelled, its connection is closed at once."""

    def __init__(self, engine: RemoteEngine) -> None:
        super().__init__()
        self._engine = engine
        self.job: _Job | None = None  # None: refused at submit

    def cancel(self) -> None:
        if self.job is not None:
            self._engine.cancel(self.job)


class RemoteEngine:
    """Implements core.engine.protocol.Engine. Entered, it has asked the server for one token.

    `cache` takes the converted demo model; `progress` is called from a thread with (fraction, what).
    """

    def __init__(
        self, model_settings: ModelSettings, settings: RemoteSettings, cache: Path, *, progress: Progress | None = None
    ) -> None:
        self.model_settings, self.settings = model_settings, settings
        self._cache, self._progress = cache, progress
        self._info: EngineInfo | None = None
        self._open: set[_Job] = set()
        self._none_open = asyncio.Event()
        self._draining = False
        self._scheduler: Scheduler[_Job] = Scheduler(settings.max_waiting)
        self._running = 0
        self._tally = Tally()
        self._mean_s = FIRST_GUESS_S
        self._salts: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._adapters: set[str] = set()  # that have answered

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="render")
        self._server = Server(self.settings)
        try:
            self._files = await self._loop.run_in_executor(
                self._workers, partial(read_model, self.model_settings, self._cache, progress=self._progress)
            )
            self._base, self._info = await meet(self._server, self.settings, self._files)
        except BaseException as error:
            await self._close()
            if isinstance(error, AppError) and not isinstance(error, ModelLoadFailed):
                raise ModelLoadFailed(detail=error.detail or str(error)) from error  # only an operator hears of it
            raise
        self._draining = False
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.drain(DRAIN_S if kind is None else 0.0)
        finally:
            for job in list(self._open):
                self.cancel(job)
            await self._tasks.__aexit__(None, None, None)
            await self._close()

    async def _close(self) -> None:
        self._info = None
        self._workers.shutdown(wait=False, cancel_futures=True)
        await self._server.close()

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineError(detail="the engine is not running: enter it first")
        return self._info

    def submit(self, request: Request) -> RemoteGeneration:
        """Begin a request; returns at once. What goes wrong is raised out of the iteration."""
        generation = RemoteGeneration(self)
        try:
            _ = self.info
            if self._draining:
                raise Overloaded(detail="the engine is shutting down", retry_after_s=DRAIN_S)
            check(request)
            job = _Job(request, generation, StopScanner(request.sampling.stop))
            try:
                displaced = self._scheduler.add(job, request.scope)
            except QueueFull:
                raise self._overloaded() from None
        except AppError as error:
            self._tally.end(error)
            generation.put(error)
            return generation
        generation.job = job
        self._open.add(job)
        if displaced is not None:
            self._end(displaced, self._overloaded())
        job.timer = self._loop.call_later(request.deadline_s, self._late, job)
        self._fill()
        return generation

    def cancel(self, job: _Job) -> None:
        if job.over:
            return
        if job.task is not None:
            job.task.cancel()
        else:
            self._end(job, FinishReason.CANCELLED)

    async def forget(self, channel: str, conversation: str = "") -> None:
        """End what runs or waits for a conversation; what the server keeps of it is never found again."""
        for key in [key for key in self._salts if key[0] == channel and conversation in ("", key[1])]:
            del self._salts[key]
        scopes = {job: job.request.scope for job in self._open}
        jobs = [job for job, at in scopes.items() if at.channel == channel and conversation in ("", at.conversation)]
        tasks = [job.task for job in jobs if job.task is not None]
        for job in jobs:
            self.cancel(job)
        if tasks:
            await asyncio.wait(tasks)

    def stats(self) -> EngineStats:
        running, waiting, adapters = self._running, len(self._scheduler), len(self._adapters)
        return replace(self._tally.stats(), running=running, waiting=waiting, resident_adapters=adapters)

    async def drain(self, deadline_s: float) -> None:
        """Take no more; finish what runs within the deadline, then cancel the rest."""
        self._draining = True
        if not await self._all_over(deadline_s):
            for job in list(self._open):
                self.cancel(job)
            await self._all_over(DRAIN_S)

    async def _all_over(self, deadline_s: float) -> bool:
        if self._open:
            self._none_open.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_open.wait(), deadline_s)
        return not self._open

    # --- requests

    def _overloaded(self) -> Overloaded:
        ahead = self._running + len(self._scheduler) + 1
        return Overloaded(retry_after_s=max(1.0, round(ahead / self.settings.max_rows * self._mean_s, 1)))

    def _fill(self) -> None:
        """Hand over to the server what fits."""
        while self._running < self.settings.max_rows and (job := self._scheduler.take()) is not None:
            self._running += 1
            self._tally.waited.add(time.monotonic() - job.submitted)
            job.task = self._tasks.create_task(self._run(job), name="completion")
            job.task.add_done_callback(partial(self._left, job))

    def _late(self, job: _Job) -> None:
        """The deadline of one that may still wait; one that runs is ended by its task."""
        if job.task is None:
            self._end(job, FinishReason.DEADLINE)

    def _left(self, job: _Job, task: asyncio.Task[FinishReason | AppError]) -> None:
        """The task is over, however that came; cancelled before its first step it has not run at all."""
        self._running -= 1
        self._mean_s += 0.1 * (time.monotonic() - job.submitted - self._mean_s)
        self._end(job, FinishReason.CANCELLED if task.cancelled() else task.result())
        self._scheduler.done(job.request.scope)
        self._fill()

    def _end(self, job: _Job, outcome: FinishReason | AppError) -> None:
        """Say the last that is said of a job; what comes after that is not heard."""
        if job.over:
            return
        job.over = True
        if job.timer is not None:
            job.timer.cancel()
        if job.task is None:
            self._scheduler.remove(job)
        if isinstance(outcome, FinishReason):
            if held := job.scanner.flush():
                job.generation.put(Delta(held))
            if job.uncounted:  # it was left before the server counted it
                tokens = len(self._files.tokenizer.encode(job.uncounted, add_special_tokens=False))
                self._count(job, job.completion_tokens + tokens)
            job.generation.put(Finished(outcome, job.usage))
        else:
            job.generation.put(outcome)
        self._tally.end(outcome)
        self._tally.reused_tokens += job.cached_tokens
        self._tally.prompt_tokens += job.prompt_tokens - job.cached_tokens if job.completion_tokens else 0
        self._open.discard(job)
        if not self._open:
            self._none_open.set()

    async def _run(self, job: _Job) -> FinishReason | AppError:
        left_s = job.submitted + job.request.deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                return await self._answer(job)
        except TimeoutError:
            return FinishReason.DEADLINE
        except AppError as error:
            log.warning("remote.failed", extra={"id": job.request.id, "why": error.detail or type(error).__name__})
            return error
        except Exception as error:  # whatever it is, this request alone ends by it
            log.exception("remote.broke")
            return EngineError(detail=type(error).__name__)

    async def _answer(self, job: _Job) -> FinishReason:
        request = job.request
        rendered = await self._loop.run_in_executor(self._workers, self._render, request)
        job.prompt_tokens = len(rendered.ids)
        self._scheduler.charge(request.scope, PROMPT_COST * job.prompt_tokens)
        ask = Ask(
            model=self._base if request.adapter is None else request.adapter.sha256,
            prompt=rendered.ids,
            sampling=request.sampling,
            max_tokens=min(request.sampling.max_tokens, self.info.context - len(rendered.ids)),
            stop_ids=tuple(sorted(self._files.eos_ids)),
            salt=self._salt(request),
        )
        reason: FinishReason | None = None
        async with AsyncExitStack() as stack:
            chunks = await self._begin(stack, ask, request)
            job.generation.put(Started(len(rendered.ids), dropped=rendered.dropped))
            async for chunk in chunks:
                self._take(job, chunk)
                reason = reason or _reason(job, chunk)
                if reason is FinishReason.STOP and not chunk.finish:
                    break  # found here before the server found it: it need not go on
        assert reason is not None  # a stream ends with a finish or an error
        return reason

    def _render(self, request: Request) -> Rendered:
        return render(request.messages, self._files.tokenizer, prompt_limit(request, self.info.context))

    def _salt(self, request: Request) -> str:
        """What the server's prefix cache is keyed with: nobody else's conversation meets this one's."""
        scope = request.scope
        fresh = secrets.token_hex(16)
        if not scope.conversation:
            return fresh
        key = scope.channel, scope.conversation
        salt = self._salts.setdefault(key, fresh)
        self._salts.move_to_end(key)
        while len(self._salts) > SALTS:
            self._salts.popitem(last=False)
        return salt

    async def _begin(self, stack: AsyncExitStack, ask: Ask, request: Request) -> AsyncIterator[Chunk]:
        """The answer's chunks; an adapter that the server does not know is loaded into it first."""
        ref = request.adapter
        loads = 0
        while True:
            try:
                chunks = await stack.enter_async_context(self._server.stream(ask))
            except NotThere as error:
                if ref is None:
                    raise
                if loads == LOADS:
                    raise _unusable(ref, error.detail) from error
                await self._load(ref)
                loads += 1
            except Refused as error:
                if any(words in error.said for words in TOO_LONG):
                    raise PromptTooLong(tokens=len(ask.prompt), limit=self.info.context) from error
                if ref is not None and ref.sha256 in error.said:
                    raise _unusable(ref, error.detail) from error
                raise
            else:
                self._adapters.update([ref.sha256] if ref else [])
                return chunks

    async def _load(self, ref: AdapterRef) -> None:
        if all(model.id != self._base for model in await self._server.models()):
            raise EngineError(detail=f"{self._server} no longer serves {self._base}: it was started anew with another")
        there = self.settings.adapters_there
        path = f"{there.rstrip('/')}/{ref.sha256}" if there else str(ref.folder.absolute())
        try:
            await self._server.load_adapter(ref.sha256, path)
        except NotThere as error:
            hint = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and let it see the adapters"
            raise _unusable(ref, f"{error.detail}; it does not load {path}: {hint}") from error
        except Refused as error:
            raise _unusable(ref, f"{error.detail}; it was told to load {path}") from error
        log.info("remote.adapter_loaded", extra={"adapter": ref.label or ref.sha256[:12]})

    def _take(self, job: _Job, chunk: Chunk) -> None:
        """Count what came, and show what of it is certain."""
        job.cached_tokens = max(job.cached_tokens, chunk.cached_tokens)
        if chunk.completion_tokens is None:
            job.uncounted += chunk.text
        else:
            job.uncounted = ""
            self._count(job, chunk.completion_tokens)
        if text := job.scanner.push(chunk.text):
            job.generation.put(Delta(text))

    def _count(self, job: _Job, tokens: int) -> None:
        """So many there are now; those that came together shared their time."""
        now, new = time.monotonic(), tokens - job.completion_tokens
        gap_s = None if job.last_token is None else (now - job.last_token) / max(new, 1)
        for _ in range(new):
            self._tally.token(now - job.submitted, gap_s)
            job.last_token, gap_s = now, gap_s or 0.0
        job.completion_tokens = tokens
        self._scheduler.charge(job.request.scope, COMPLETION_COST * new)


def _reason(job: _Job, chunk: Chunk) -> FinishReason | None:
    """Why the answer ends with this chunk, if it does."""
    if job.scanner.hit or chunk.stopped_by:
        return FinishReason.STOP
    match chunk.finish:
        case "":
            return None
        case "stop":
            return FinishReason.END
        case "length":
            return FinishReason.LENGTH
        case other:  # vLLM's "abort" and "error"
            raise EngineError(detail=f"the server ended the answer itself: {other[:40]}")


def _unusable(ref: AdapterRef, detail: str) -> AdapterUnusable:
    label = ref.label or ref.sha256[:12]
    return AdapterUnusable(detail=f"adapter {label}: {detail}", label=label)
