"""An engine that answers from a table, for tests, load drills and demonstrations of bots.

A token is a word with the space before it. Adapters are accepted unchecked.
"""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from core.engine.protocol import (
    Delta,
    EngineInfo,
    EngineStats,
    Finished,
    FinishReason,
    Request,
    Started,
    check_request,
)
from core.engine.scheduling.detokenizer import StopScanner
from core.engine.scheduling.stats import StatsCounter
from core.engine.scheduling.stream import EventStream
from core.errors import BadConfig, BadInput, Overloaded, PromptTooLong
from core.types import Role, TokenUsage

Answer = str | Exception
Answers = Mapping[str, Answer] | Callable[[Request], Answer]

WORD = re.compile(r"\s*\S+|\s+$")
FINGERPRINT = "scripted"


class ScriptedGeneration(EventStream):
    """The events of one request; what is to come is made while it is read, or by a task of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = asyncio.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """Implements core.engine.protocol.Engine. `delay_s` passes before each word.

    `answers` maps the last message to the answer, or is called with the request; an answer that is an exception is
    raised out of the iteration. No entry: "You said: <last message>". `requests` keeps all that were submitted.
    """

    def __init__(
        self,
        answers: Answers | None = None,
        *,
        delay_s: float = 0.0,
        context: int = 4096,
        max_rows: int = 8,
        max_waiting: int = 256,
    ) -> None:
        self.answers: Answers = {} if answers is None else answers
        self.delay_s, self.context, self.max_waiting = delay_s, context, max_waiting
        self.requests: list[Request] = []
        self._rows = asyncio.Semaphore(max_rows)
        self._open: dict[ScriptedGeneration, tuple[Request, asyncio.Task[None]]] = {}
        self._waiting = self._running = 0
        self._counter = StatsCounter()
        self._draining = False

    @classmethod
    def from_file(cls, path: Path, *, delay_s: float = 0.0) -> Self:
        """A table from a TOML or JSON file: last message = answer, at the top or under `answers`; and `delay_s`.

        Raises BadConfig.
        """
        try:
            text = path.read_text("utf-8")
            table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
            delay_s = float(table.pop("delay_s", delay_s))
            answers = table.get("answers", table)
            if not all(isinstance(answer, str) for answer in answers.values()):
                raise ValueError("every answer must be text")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise BadConfig(detail=f"the table of answers {path} cannot be read: {error}") from error
        return cls(answers, delay_s=delay_s)

    async def __aenter__(self) -> Self:
        self._draining = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain(10.0 if kind is None else 0.0)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("scripted", FINGERPRINT, "answers from a table", self.context)

    def submit(self, request: Request) -> ScriptedGeneration:
        generation = ScriptedGeneration()
        self.requests.append(request)
        try:
            check_request(request)
        except BadInput as error:
            generation.put(error)
            return generation
        if self._draining or self._waiting >= self.max_waiting:
            generation.put(busy := Overloaded(retry_after_s=1.0))
            self._counter.end(busy)
            return generation
        self._waiting += 1
        task = asyncio.get_running_loop().create_task(self._run(request, generation))
        self._open[generation] = request, task
        return generation

    async def forget(self, channel: str, conversation: str = "") -> None:
        tasks = []
        for generation, (request, task) in list(self._open.items()):
            if request.scope.channel == channel and conversation in ("", request.scope.conversation):
                generation.cancel()
                tasks.append(task)
        await asyncio.gather(*tasks)

    def stats(self) -> EngineStats:
        return replace(self._counter.stats(), running=self._running, waiting=self._waiting)

    async def drain(self, deadline_s: float) -> None:
        self._draining = True
        tasks = [task for _, task in self._open.values()]
        if tasks and deadline_s > 0:
            await asyncio.wait(tasks, timeout=deadline_s)
        for generation in list(self._open):
            generation.cancel()
        await asyncio.gather(*tasks)

    async def _run(self, request: Request, generation: ScriptedGeneration) -> None:
        script = _Script(request, generation, self._counter)
        waiting = True
        try:
            row = asyncio.create_task(self._rows.acquire())
            reason = await script.pause_until(row)
            self._waiting -= 1
            waiting = False
            if reason is not None:
                script.finish(reason)
                return
            self._running += 1
            try:
                await self._say(script)
            finally:
                self._running -= 1
                self._rows.release()
        except Exception as error:  # injected by the table, or raised by its function: the reader's to handle
            self._counter.end(error)
            generation.put(error)
        finally:
            self._waiting -= waiting
            self._open.pop(generation, None)

    async def _say(self, script: _Script) -> None:
        answer = self._answer(script.request)
        if isinstance(answer, Exception):
            raise answer
        script.start(self.context)
        reason = await self._words(script, WORD.findall(answer))
        script.finish(reason)

    async def _words(self, script: _Script, words: list[str]) -> FinishReason:
        for word in words:
            reason = await script.pause(self.delay_s)
            if reason is not None:
                return reason
            reason = script.say(word)
            if reason is not None:
                return reason
        return FinishReason.END

    def _answer(self, request: Request) -> Answer:
        if not isinstance(self.answers, Mapping):
            return self.answers(request)
        last = request.messages[-1].text
        return self.answers.get(last, f"You said: {last}")


class _Script:
    """One answer being said."""

    def __init__(self, request: Request, generation: ScriptedGeneration, counter: StatsCounter) -> None:
        self.request, self.generation, self.counter = request, generation, counter
        self.submitted = asyncio.get_running_loop().time()
        self.last_word: float | None = None
        self.scanner = StopScanner(request.sampling.stop)
        self.prompt_tokens = self.completion_tokens = 0

    def start(self, context: int) -> None:
        """Count the prompt; drop the oldest exchanges as prompt.render does."""
        limit = min(self.request.max_prompt_tokens or context, context)
        messages = list(self.request.messages)
        head = next((i for i, m in enumerate(messages) if m.role is not Role.SYSTEM), len(messages) - 1)
        dropped = 0
        while (tokens := sum(len(WORD.findall(m.text)) for m in messages)) > limit:
            following = [i for i, m in enumerate(messages) if i > head and m.role is Role.USER]
            if not following:
                raise PromptTooLong(tokens=tokens, limit=limit)
            dropped += following[0] - head
            del messages[head : following[0]]
        self.prompt_tokens = tokens
        self.counter.prompt_tokens += tokens
        self.counter.waited.add(asyncio.get_running_loop().time() - self.submitted)
        self.generation.put(Started(tokens, dropped=dropped))

    async def pause_until(self, row: asyncio.Task[Literal[True]]) -> FinishReason | None:
        """Wait for a row; the reason why it came to nothing, if so."""
        cancelled = asyncio.create_task(self.generation.cancelled.wait())
        try:
            await asyncio.wait((row, cancelled), timeout=self._left(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
        if row.done():
            return None
        row.cancel()
        return FinishReason.CANCELLED if self.generation.cancelled.is_set() else FinishReason.DEADLINE

    async def pause(self, delay_s: float) -> FinishReason | None:
        """Wait between words; the reason to stop, if there is one."""
        try:
            await asyncio.wait_for(self.generation.cancelled.wait(), min(delay_s, self._left()))
        except TimeoutError:
            if delay_s <= 0:
                await asyncio.sleep(0)
        if self.generation.cancelled.is_set():
            return FinishReason.CANCELLED
        return FinishReason.DEADLINE if self._left() <= 0 else None

    def say(self, word: str) -> FinishReason | None:
        self.completion_tokens += 1
        now = asyncio.get_running_loop().time()
        self.counter.token(now - self.submitted, None if self.last_word is None else now - self.last_word)
        self.last_word = now
        self._show(self.scanner.push(word))
        if self.scanner.hit:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.completion_tokens >= self.request.sampling.max_tokens else None

    def finish(self, reason: FinishReason) -> None:
        self._show(self.scanner.flush())
        self.counter.end(reason)
        self.generation.put(Finished(reason, TokenUsage(self.prompt_tokens, self.completion_tokens)))

    def _show(self, text: str) -> None:
        if text:
            self.generation.put(Delta(text))

    def _left(self) -> float:
        return max(0.0, self.submitted + self.request.deadline_s - asyncio.get_running_loop().time())
