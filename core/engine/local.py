"""The engine of this process: a model thread behind the protocol. Knows no chats, users' texts or SQLite.

Threads and what they may touch: the event loop submits and reads events; the model thread owns all tensors of rows;
two more render prompts and read adapter files; one loads the model and ends. Events cross to the loop once per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from core.demo import Progress
from core.engine.adapter_files import AdapterStore, AdapterWeights, Base
from core.engine.floor import bandwidth
from core.engine.loop import ModelThread, Output
from core.engine.lora import head_name, shapes
from core.engine.proof import check_exact
from core.engine.protocol import (
    EngineInfo,
    EngineSettings,
    EngineStats,
    Finished,
    ModelSettings,
    Request,
    check,
    prompt_limit,
)
from core.engine.stream import EventStream
from core.engine.tally import Tally
from core.engine.text import Detokenizer, StopScanner
from core.engine.ticket import Job
from core.errors import AppError, EngineError, Overloaded
from core.model import BaseModel, load_model
from core.prompt import Rendered, render

log = logging.getLogger(__name__)

DRAIN_S = 10.0  # when the engine is left without an error
CANCEL_S = 60.0  # for cancelled requests to end: one step, which may be a long one


class LocalGeneration(EventStream):
    """The events of one request; cancelled, it ends within one step."""

    def __init__(self, engine: LocalEngine) -> None:
        super().__init__()
        self._engine = engine
        self.job: Job | None = None  # None: refused at submit

    def cancel(self) -> None:
        if self.job is not None:
            self._engine.cancel(self.job)


class LocalEngine:
    """Implements core.engine.protocol.Engine. The model is loaded when the engine is entered.

    `cache` takes the converted demo model; `progress` is called from a thread with (fraction, what).
    A `model` that is loaded already may be handed over instead.
    """

    def __init__(
        self,
        model_settings: ModelSettings,
        settings: EngineSettings,
        cache: Path,
        *,
        progress: Progress | None = None,
        model: BaseModel | None = None,
    ) -> None:
        self.model_settings, self.settings = model_settings, settings
        self._cache, self._progress = cache, progress
        self._model = model
        self._open: dict[Job, LocalGeneration] = {}
        self._none_open = asyncio.Event()
        self._draining = False
        self._info: EngineInfo | None = None
        self._bandwidth = 0.0
        self.tally = Tally()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        # A thread that ran a large operator keeps OpenMP's workers as long as it lives, and all spin more slowly
        # while there are more of them than cores: the one that loads must end before the model thread begins.
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        try:
            model = await self._loop.run_in_executor(loader, self._load)
        finally:
            loader.shutdown(wait=False)
        context = min(model.context, self.settings.max_context)
        self._info = EngineInfo(
            model.name, model.fingerprint, model.description, context, model.folder, str(model.device)
        )
        self.base = Base(model.fingerprint, shapes(model.module), model.dtype, head_name(model.module))
        self._adapters = AdapterStore(self.base, limit=self.settings.adapters_in_memory)
        self._model, self._draining = model, False
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="engine")
        self.thread = ModelThread(
            model,
            self.settings,
            context=context,
            prepare=self._prepare,
            spawn=self._workers.submit,
            emit=self._emit,
            tally=self.tally,
        )
        self.thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.drain(DRAIN_S if kind is None else 0.0)
        finally:
            await self._loop.run_in_executor(None, self.thread.stop)
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._info = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineError(detail="the engine is not running: enter it first")
        return self._info

    def submit(self, request: Request) -> LocalGeneration:
        """Begin a request; returns at once. What goes wrong is raised out of the iteration."""
        generation = LocalGeneration(self)
        try:
            tokenizer = self._running_model().tokenizer
            check(request)
            job = Job(
                request,
                deadline=time.monotonic() + request.deadline_s,
                detokenizer=Detokenizer(tokenizer),
                scanner=StopScanner(request.sampling.stop),
            )
            self._open[job] = generation  # before the model thread can end it
            try:
                self.thread.submit(job)
            except AppError:
                self._close(job)
                raise
            generation.job = job
        except AppError as error:
            self.tally.end(error)
            generation.put(error)
        return generation

    def cancel(self, job: Job) -> None:
        if self._info is not None:
            self.thread.cancel(job)

    async def forget(self, channel: str, conversation: str = "") -> None:
        """Wipe what memory holds of a conversation; what runs or waits for it ends as cancelled."""
        if self._info is not None:
            await asyncio.wrap_future(self.thread.forget(channel, conversation))

    def stats(self) -> EngineStats:
        if self._info is None:
            return EngineStats()
        thread = self.thread
        return replace(
            self.tally.stats(),
            running=thread.running,
            waiting=thread.waiting,
            resident_adapters=len(thread.runner.lora.slots),
            adapters_in_memory=len(self._adapters),
            positions_read=thread.runner.positions_read,
            positions_held=thread.runner.positions_held,
            bandwidth=self._bandwidth,
        )

    async def drain(self, deadline_s: float) -> None:
        """Take no more; finish what runs within the deadline, then cancel the rest."""
        self._draining = True
        if not await self._all_over(deadline_s):
            for generation in list(self._open.values()):
                generation.cancel()
            if not await self._all_over(CANCEL_S):
                log.error("engine.drain_stuck", extra={"open": len(self._open)})

    async def _all_over(self, deadline_s: float) -> bool:
        """Whether no request is open any more, after at most that time."""
        if self._open:
            self._none_open.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_open.wait(), deadline_s)
        return not self._open

    def _running_model(self) -> BaseModel:
        if self._info is None or self._model is None:
            raise EngineError(detail="the engine is not running: enter it first")
        if self._draining:
            raise Overloaded(detail="the engine is shutting down", retry_after_s=DRAIN_S)
        return self._model

    # --- other threads

    def _load(self) -> BaseModel:
        model = self._model or load_model(
            self.model_settings, self._cache, progress=self._progress, threads=self.settings.threads
        )
        check_exact(model)
        self._bandwidth = bandwidth(model.device, torch.get_num_threads())
        return model

    def _prepare(self, job: Job) -> tuple[Rendered, AdapterWeights | None]:
        """Render the prompt and read the adapter."""
        assert self._model is not None
        request = job.request
        rendered = render(request.messages, self._model.tokenizer, prompt_limit(request, self.info.context))
        return rendered, None if request.adapter is None else self._adapters.get(request.adapter)

    def _emit(self, outputs: list[Output]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the event loop is closed: nobody listens
            log.warning("engine.nobody_listens", extra={"events": len(outputs)})

    def _deliver(self, outputs: list[Output]) -> None:
        for job, event in outputs:
            generation = self._open.get(job)
            if generation is None:
                continue
            generation.put(event)
            if isinstance(event, Finished | AppError):
                self.tally.end(event.reason if isinstance(event, Finished) else event)
                self._close(job)

    def _close(self, job: Job) -> None:
        del self._open[job]
        if not self._open:
            self._none_open.set()
