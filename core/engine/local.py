"""The engine of this process: a model thread behind the protocol.

Threads: the event loop submits requests and reads events; the model thread owns all tensors of rows; two workers render
prompts; adapter files and the model are loaded by threads that end afterwards. Events cross to the loop once per step.
"""

import asyncio
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from core.config.sections import EngineSettings, ModelSettings
from core.engine.diagnostics.parity import check_parity
from core.engine.lora.adapter_files import AdapterStore, AdapterTarget, AdapterWeights
from core.engine.lora.slots import head_name, linear_shapes
from core.engine.protocol import EngineInfo, EngineStats, Request, prompt_limit
from core.engine.runtime.loading import load_for_serving
from core.engine.runtime.loop import ModelThread, Output
from core.engine.runtime.roofline import bandwidth
from core.engine.scheduling.detokenizer import Detokenizer, StopScanner
from core.engine.scheduling.request_state import RequestState
from core.engine.scheduling.requests import DRAIN_S, OpenRequests, RunningGeneration
from core.engine.scheduling.stats import StatsCounter
from core.model.base import BaseModel
from core.model.chat_format import RenderedPrompt, render
from core.model.demo import Progress

log = logging.getLogger(__name__)

CANCEL_S = 60.0  # for cancelled requests to end: one step, which may be long


class LocalEngine:
    """Implements core.engine.protocol.Engine. The model is loaded when the engine is entered.

    `cache` takes the converted demo model; `progress` is called from a thread with the fraction done and what is being
    done. A loaded `model` may be passed instead.
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
        self._bandwidth = 0.0
        self.counter = StatsCounter()
        self._requests: OpenRequests[RequestState] = OpenRequests(self.counter, self.cancel)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        # A thread that ran a large operator keeps its OpenMP workers as long as it lives, and workers beyond the number
        # of cores slow all of them down: the loading thread has to end before the model thread starts.
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        try:
            model = await self._loop.run_in_executor(loader, self._load)
        finally:
            loader.shutdown(wait=False)
        context = min(model.context, self.settings.max_context)
        info = EngineInfo(model.name, model.fingerprint, model.description, context, model.folder, str(model.device))
        self.base = AdapterTarget(model.fingerprint, linear_shapes(model.module), model.dtype, head_name(model.module))
        self._adapters = AdapterStore(self.base, limit=self.settings.adapters_in_memory)
        self._model = model
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="engine")
        self.thread = ModelThread(
            model,
            self.settings,
            context=context,
            prepare=self._prepare,
            spawn=self._workers.submit,
            emit=self._emit,
            counter=self.counter,
        )
        self.thread.start()
        self._requests.unlock(info)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.drain(DRAIN_S if kind is None else 0.0)
        finally:
            await self._loop.run_in_executor(None, self.thread.stop)
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._requests.lock()

    @property
    def info(self) -> EngineInfo:
        return self._requests.info

    def submit(self, request: Request) -> RunningGeneration[RequestState]:
        """Begin a request; returns at once. Errors are raised out of the iteration."""
        return self._requests.begin(request, lambda: self._new_state(request), lambda state: self.thread.submit(state))

    def cancel(self, state: RequestState) -> None:
        if self._requests.running:
            self.thread.cancel(state)

    async def forget(self, channel: str, conversation: str = "") -> None:
        """Wipe what memory holds of a conversation; its running and waiting requests end as cancelled."""
        if self._requests.running:
            await asyncio.wrap_future(self.thread.forget(channel, conversation))

    def stats(self) -> EngineStats:
        if not self._requests.running:
            return EngineStats()
        thread = self.thread
        return replace(
            self.counter.stats(),
            running=thread.running,
            waiting=thread.waiting,
            resident_adapters=len(thread.runner.lora.slots),
            adapters_in_memory=len(self._adapters),
            positions_read=thread.runner.positions_read,
            positions_held=thread.runner.positions_held,
            bandwidth=self._bandwidth,
        )

    async def drain(self, deadline_s: float) -> None:
        """Accept no more; finish running requests within the deadline, then cancel the rest."""
        await self._requests.drain(deadline_s, CANCEL_S)

    def _new_state(self, request: Request) -> RequestState:
        assert self._model is not None
        return RequestState(
            request,
            deadline=time.monotonic() + request.deadline_s,
            detokenizer=Detokenizer(self._model.tokenizer),
            scanner=StopScanner(request.sampling.stop),
        )

    # --- on other threads

    def _load(self) -> BaseModel:
        model = self._model or load_for_serving(
            self.model_settings, self._cache, progress=self._progress, threads=self.settings.threads
        )
        check_parity(model)
        self._bandwidth = bandwidth(model.device, torch.get_num_threads())
        return model

    def _prepare(self, state: RequestState) -> tuple[RenderedPrompt, Future[AdapterWeights] | None]:
        """Render the prompt and have the adapter read."""
        assert self._model is not None
        request = state.request
        rendered = render(request.messages, self._model.tokenizer, prompt_limit(request, self.info.context))
        return rendered, None if request.adapter is None else self._adapters.get(request.adapter)

    def _emit(self, outputs: list[Output]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the event loop is closed
            log.warning("engine.loop_closed", extra={"events": len(outputs)})

    def _deliver(self, outputs: list[Output]) -> None:
        for state, event in outputs:
            self._requests.put(state, event)
