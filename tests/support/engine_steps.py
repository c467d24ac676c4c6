"""The model thread driven step by step, so that tests count steps instead of time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future

import torch

from core.config.sections import EngineSettings
from core.engine.lora.adapter_files import AdapterWeights
from core.engine.protocol import Delta, Finished, Request, Scope, Started
from core.engine.runtime.loop import ModelThread, Output
from core.engine.scheduling.detokenizer import Detokenizer, StopScanner
from core.engine.scheduling.request_state import RequestState
from core.engine.scheduling.stats import StatsCounter
from core.model.base import BaseModel
from core.model.chat_format import RenderedPrompt
from core.types import AdapterRef, Sampling


class Steps:
    """Jobs are prepared at once; a prompt is as many tokens as its request's id says before the colon."""

    def __init__(self, model: BaseModel, adapters: Mapping[str, AdapterWeights] | None = None, **settings: int) -> None:
        self.model, self.adapters = model, adapters or {}
        self.now = 0
        self.texts: dict[str, str] = {}
        self.begun: dict[str, int] = {}  # by id: the step in which it got its first row
        self.over: dict[str, Finished | Exception] = {}
        self.thread = ModelThread(
            model,
            EngineSettings(**settings),
            context=512,
            prepare=self._prepare,
            spawn=lambda work: work(),
            emit=self._emit,
            counter=StatsCounter(),
        )

    def submit(self, name: str, scope: Scope, *, adapter: str = "", **sampling: float) -> None:
        ref = AdapterRef(adapter, self.model.folder) if adapter else None
        request = Request(name, (), Sampling(**{"max_tokens": 8, **sampling}), ref, scope)  # type: ignore[arg-type]
        detokenizer, scanner = Detokenizer(self.model.tokenizer), StopScanner(())
        self.thread.submit(RequestState(request, deadline=math.inf, detokenizer=detokenizer, scanner=scanner))

    def step(self) -> None:
        with torch.inference_mode():
            self.thread._step()
            self.thread._flush()
        self.now += 1

    def until_over(self, *names: str, within: int) -> None:
        while not set(names) <= self.over.keys():
            assert self.now < within, f"{set(names) - self.over.keys()} still wait"
            self.step()

    def _prepare(self, state: RequestState) -> tuple[RenderedPrompt, Future[AdapterWeights] | None]:
        count, adapter = int(state.request.id.partition(":")[0]), state.request.adapter
        ids = tuple(3 + (7 * i + count) % 250 for i in range(count))
        if adapter is None:
            return RenderedPrompt(ids, 0), None
        read: Future[AdapterWeights] = Future()
        read.set_result(self.adapters[adapter.sha256])
        return RenderedPrompt(ids, 0), read

    def _emit(self, outputs: list[Output]) -> None:
        for state, event in outputs:
            name = state.request.id
            if isinstance(event, Started):
                assert name not in self.begun, "it began twice"
                self.begun[name] = self.now
            elif isinstance(event, Delta):
                self.texts[name] = self.texts.get(name, "") + event.text
            else:
                assert name not in self.over
                self.over[name] = event
