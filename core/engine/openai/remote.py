"""The engine protocol over an OpenAI-compatible server such as vLLM.

Fairness and bounds apply in front of the server: at most `max_rows` requests are sent to it, the others wait in
core.engine.scheduling.scheduler.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from core.config.sections import ModelSettings, RemoteSettings
from core.engine.openai.client import OpenAIServer
from core.engine.openai.preflight import check_server
from core.engine.openai.request_builder import RequestBuilder
from core.engine.openai.sse import Chunk
from core.engine.protocol import Delta, EngineInfo, EngineStats, Finished, FinishReason, Request, Started
from core.engine.scheduling.detokenizer import StopScanner
from core.engine.scheduling.requests import DRAIN_S, OpenRequests, RunningGeneration
from core.engine.scheduling.scheduler import COMPLETION_COST, PROMPT_COST, QueueFull, Scheduler
from core.engine.scheduling.stats import StatsCounter
from core.errors import AppError, EngineError, ModelLoadFailed, Overloaded
from core.model.base import read_model
from core.model.demo import Progress
from core.types import TokenUsage

log = logging.getLogger(__name__)

INITIAL_S = 10.0  # estimate of a request's time at the server before the first one ended


@dataclass(eq=False, slots=True)
class RemoteRequestState:
    """State of one request. `task` exists while it is at the server."""

    request: Request
    scanner: StopScanner
    submitted: float = field(default_factory=time.monotonic)
    begun: float = 0.0  # when it was sent to the server
    task: asyncio.Task[FinishReason | AppError] | None = None
    timer: asyncio.TimerHandle | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    uncounted: str = ""  # text since the server's last count
    last_token: float | None = None

    @property
    def usage(self) -> TokenUsage:
        return TokenUsage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


class RemoteEngine:
    """Implements core.engine.protocol.Engine. Entering it checks the server with one token.

    `cache` takes the converted demo model; `progress` is called from a thread with the fraction done and what is being
    done.
    """

    def __init__(
        self, model_settings: ModelSettings, settings: RemoteSettings, cache: Path, *, progress: Progress | None = None
    ) -> None:
        self.model_settings, self.settings = model_settings, settings
        self._cache, self._progress = cache, progress
        self._scheduler: Scheduler[RemoteRequestState] = Scheduler(settings.max_waiting)
        self._running = 0
        self._counter = StatsCounter()
        self._requests: OpenRequests[RemoteRequestState] = OpenRequests(self._counter, self.cancel)
        self._mean_s = INITIAL_S

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="render")
        self._server = OpenAIServer(self.settings)
        try:
            files = await self._loop.run_in_executor(
                self._workers, partial(read_model, self.model_settings, self._cache, progress=self._progress)
            )
            base, info = await check_server(self._server, self.settings, files)
        except BaseException as error:
            await self._close()
            if isinstance(error, AppError) and not isinstance(error, ModelLoadFailed):
                raise ModelLoadFailed(detail=error.detail or str(error)) from error  # shown to operators only
            raise
        self._builder = RequestBuilder(self._server, self.settings, files, base, info.context)
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._requests.unlock(info)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.drain(DRAIN_S if kind is None else 0.0)
        finally:
            for state in self._requests.states:
                self.cancel(state)
            await self._tasks.__aexit__(None, None, None)
            await self._close()

    async def _close(self) -> None:
        self._requests.lock()
        self._workers.shutdown(wait=False, cancel_futures=True)
        await self._server.close()

    @property
    def info(self) -> EngineInfo:
        return self._requests.info

    def submit(self, request: Request) -> RunningGeneration[RemoteRequestState]:
        """Begin a request; returns at once. Errors are raised out of the iteration."""
        return self._requests.begin(
            request, lambda: RemoteRequestState(request, StopScanner(request.sampling.stop)), self._enter
        )

    def cancel(self, state: RemoteRequestState) -> None:
        if state.task is not None:
            state.task.cancel()
        else:
            self._end(state, FinishReason.CANCELLED)

    async def forget(self, channel: str, conversation: str = "") -> None:
        """End what runs or waits for a conversation; its prefix at the server can no longer be reused."""
        if not self._requests.running:
            return
        self._builder.forget(channel, conversation)
        scopes = {state: state.request.scope for state in self._requests.states}
        states = [
            state for state, at in scopes.items() if at.channel == channel and conversation in ("", at.conversation)
        ]
        tasks = [state.task for state in states if state.task is not None]
        for state in states:
            self.cancel(state)
        if tasks:
            await asyncio.wait(tasks)

    def stats(self) -> EngineStats:
        return replace(
            self._counter.stats(),
            running=self._running,
            waiting=len(self._scheduler),
            resident_adapters=len(self._builder.adapters) if self._requests.running else 0,
        )

    async def drain(self, deadline_s: float) -> None:
        """Accept no more; finish running requests within the deadline, then cancel the rest."""
        await self._requests.drain(deadline_s, DRAIN_S)

    # --- requests

    def _enter(self, state: RemoteRequestState) -> None:
        try:
            displaced = self._scheduler.add(state, state.request.scope)
        except QueueFull:
            raise self._overloaded() from None
        if displaced is not None:
            self._end(displaced, self._overloaded())
        state.timer = self._loop.call_later(state.request.deadline_s, self._late, state)
        self._fill()

    def _overloaded(self) -> Overloaded:
        ahead = self._running + len(self._scheduler) + 1
        return Overloaded(retry_after_s=max(1.0, round(ahead / self.settings.max_rows * self._mean_s, 1)))

    def _fill(self) -> None:
        """Send the next requests to the server while it has room."""
        while self._running < self.settings.max_rows and (state := self._scheduler.take()) is not None:
            self._running += 1
            state.begun = time.monotonic()
            self._counter.waited.add(state.begun - state.submitted)
            state.task = self._tasks.create_task(self._run(state), name="completion")
            state.task.add_done_callback(partial(self._left, state))

    def _late(self, state: RemoteRequestState) -> None:
        """End a waiting request at its deadline; a running one is ended by its task."""
        if state.task is None:
            self._end(state, FinishReason.DEADLINE)

    def _left(self, state: RemoteRequestState, task: asyncio.Task[FinishReason | AppError]) -> None:
        """The task has ended. One cancelled before its first step has not run at all."""
        self._running -= 1
        self._mean_s += 0.1 * (time.monotonic() - state.begun - self._mean_s)
        self._end(state, FinishReason.CANCELLED if task.cancelled() else task.result())
        self._scheduler.done(state.request.scope)
        self._fill()

    def _end(self, state: RemoteRequestState, outcome: FinishReason | AppError) -> None:
        """Emit the last event of a request; later ones are dropped."""
        if not self._requests.is_open(state):
            return
        if state.timer is not None:
            state.timer.cancel()
        if state.task is None:
            self._scheduler.remove(state)
        last: Finished | AppError
        if isinstance(outcome, FinishReason):
            if held := state.scanner.flush():
                self._requests.put(state, Delta(held))
            if state.uncounted:  # the stream ended before the server counted it
                self._count(state, state.completion_tokens + self._builder.count(state.uncounted))
            last = Finished(outcome, state.usage)
        else:
            last = outcome
        self._counter.reused_tokens += state.cached_tokens
        self._counter.prompt_tokens += state.prompt_tokens - state.cached_tokens if state.completion_tokens else 0
        self._requests.put(state, last)

    async def _run(self, state: RemoteRequestState) -> FinishReason | AppError:
        left_s = state.submitted + state.request.deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                return await self._answer(state)
        except TimeoutError:
            return FinishReason.DEADLINE
        except AppError as error:
            log.warning("remote.failed", extra={"id": state.request.id, "why": error.detail or type(error).__name__})
            return error
        except Exception as error:  # ends this request only
            log.exception("remote.request_broke")
            return EngineError(detail=type(error).__name__)

    async def _answer(self, state: RemoteRequestState) -> FinishReason:
        request = state.request
        rendered = await self._builder.render(request, self._workers)
        state.prompt_tokens = len(rendered.ids)
        self._scheduler.charge(request.scope, PROMPT_COST * state.prompt_tokens)
        reason: FinishReason | None = None
        async with AsyncExitStack() as stack:
            chunks = await self._builder.begin(stack, self._builder.build(request, rendered.ids), request.adapter)
            self._requests.put(state, Started(len(rendered.ids), dropped=rendered.dropped))
            async for chunk in chunks:
                self._take(state, chunk)
                reason = reason or _reason(state, chunk)
                if reason is FinishReason.STOP and not chunk.finish:
                    break  # found here first: the server need not go on
        assert reason is not None  # a stream ends with a finish or an error
        return reason

    def _take(self, state: RemoteRequestState, chunk: Chunk) -> None:
        """Count a chunk's tokens and emit the text that is certain."""
        state.cached_tokens = max(state.cached_tokens, chunk.cached_tokens)
        if chunk.completion_tokens is None:
            state.uncounted += chunk.text
        else:
            state.uncounted = ""
            self._count(state, chunk.completion_tokens)
        if text := state.scanner.push(chunk.text):
            self._requests.put(state, Delta(text))

    def _count(self, state: RemoteRequestState, tokens: int) -> None:
        """Record the number of tokens so far; tokens that came together share the time since the last ones."""
        now, new = time.monotonic(), tokens - state.completion_tokens
        gap_s = None if state.last_token is None else (now - state.last_token) / max(new, 1)
        for _ in range(new):
            self._counter.token(now - state.submitted, gap_s)
            state.last_token, gap_s = now, gap_s or 0.0
        state.completion_tokens = tokens
        self._scheduler.charge(state.request.scope, COMPLETION_COST * new)


def _reason(state: RemoteRequestState, chunk: Chunk) -> FinishReason | None:
    """Why the answer ends with this chunk, if it does."""
    if state.scanner.hit or chunk.stopped_by:
        return FinishReason.STOP
    match chunk.finish:
        case "":
            return None
        case "stop":
            return FinishReason.END
        case "length":
            return FinishReason.LENGTH
        case other:  # "abort" and "error" of vLLM
            raise EngineError(detail=f"the server ended the answer itself: {other[:40]}")
