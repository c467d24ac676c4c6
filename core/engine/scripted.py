"""An engine that answers from a table, for tests, load drills and demonstrations of bots.

A token is a word with the space before it. Adapters are accepted unchecked.
"""

import asyncio
import json
import re
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from core.engine.protocol import Delta, EngineInfo, EngineStats, Finished, FinishReason, Request, Started
from core.engine.scheduling.detokenizer import StopScanner
from core.engine.scheduling.requests import DRAIN_S, OpenRequests, RunningGeneration
from core.engine.scheduling.stats import StatsCounter
from core.errors import BadConfig, Overloaded, PromptTooLong
from core.types import Role, TokenUsage

Answer = str | Exception
Answers = Mapping[str, Answer] | Callable[[Request], Answer]

WORD = re.compile(r"\s*\S+|\s+$")
FINGERPRINT = "scripted"


@dataclass(eq=False, slots=True)
class ScriptedRequest:
    request: Request
    scanner: StopScanner
    submitted: float = field(default_factory=time.monotonic)
    task: asyncio.Task[FinishReason | Exception] | None = None
    running: bool = False
    last_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ScriptedEngine:
    """Implements core.engine.protocol.Engine. `delay_s` passes before each word.

    `answers` maps the last message to the answer, or is called with the request; an answer that is an exception is
    raised to the reader. Without an entry the answer is "You said: <last message>". `requests` lists all requests.
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
        self.delay_s, self.max_waiting = delay_s, max_waiting
        self.info = EngineInfo("scripted", FINGERPRINT, "answers from a table", context)
        self.requests: list[Request] = []
        self._rows = asyncio.Semaphore(max_rows)
        self._counter = StatsCounter()
        self._open: OpenRequests[ScriptedRequest] = OpenRequests(self._counter, self.cancel)
        self._open.unlock(self.info)

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
        self._open.unlock(self.info)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain(DRAIN_S if kind is None else 0.0)

    def submit(self, request: Request) -> RunningGeneration[ScriptedRequest]:
        self.requests.append(request)
        return self._open.begin(
            request, lambda: ScriptedRequest(request, StopScanner(request.sampling.stop)), self._enter
        )

    def cancel(self, state: ScriptedRequest) -> None:
        if state.task is not None:
            state.task.cancel()

    async def forget(self, channel: str, conversation: str = "") -> None:
        tasks = []
        for state in self._open.states:
            scope = state.request.scope
            if state.task is not None and scope.channel == channel and conversation in ("", scope.conversation):
                state.task.cancel()
                tasks.append(state.task)
        if tasks:
            await asyncio.wait(tasks)

    def stats(self) -> EngineStats:
        running = sum(state.running for state in self._open.states)
        return replace(self._counter.stats(), running=running, waiting=len(self._open.states) - running)

    async def drain(self, deadline_s: float) -> None:
        await self._open.drain(deadline_s, DRAIN_S)

    def _enter(self, state: ScriptedRequest) -> None:
        if self.stats().waiting > self.max_waiting:  # `state` is one of them
            raise Overloaded(retry_after_s=1.0)
        state.task = asyncio.get_running_loop().create_task(self._run(state))
        state.task.add_done_callback(
            lambda task: self._end(state, FinishReason.CANCELLED if task.cancelled() else task.result())
        )

    async def _run(self, state: ScriptedRequest) -> FinishReason | Exception:
        try:
            async with asyncio.timeout(state.request.deadline_s), self._rows:
                state.running = True
                return await self._answer(state)
        except TimeoutError:
            return FinishReason.DEADLINE
        except Exception as error:  # from the table, or raised by its function
            return error

    def _end(self, state: ScriptedRequest, outcome: FinishReason | Exception) -> None:
        if isinstance(outcome, Exception):
            self._open.put(state, outcome)
            return
        if held := state.scanner.flush():
            self._open.put(state, Delta(held))
        self._open.put(state, Finished(outcome, TokenUsage(state.prompt_tokens, state.completion_tokens)))

    async def _answer(self, state: ScriptedRequest) -> FinishReason:
        last = state.request.messages[-1].text
        if isinstance(self.answers, Mapping):
            answer = self.answers.get(last, f"You said: {last}")
        else:
            answer = self.answers(state.request)
        if isinstance(answer, Exception):
            raise answer
        self._start(state)
        for word in WORD.findall(answer):
            await asyncio.sleep(self.delay_s)
            now = time.monotonic()
            state.completion_tokens += 1
            self._counter.token(now - state.submitted, None if state.last_token is None else now - state.last_token)
            state.last_token = now
            if text := state.scanner.push(word):
                self._open.put(state, Delta(text))
            if state.scanner.hit:
                return FinishReason.STOP
            if state.completion_tokens >= state.request.sampling.max_tokens:
                return FinishReason.LENGTH
        return FinishReason.END

    def _start(self, state: ScriptedRequest) -> None:
        """Count the prompt; drop the oldest exchanges as core.model.chat_format.render does."""
        limit = min(state.request.max_prompt_tokens or self.info.context, self.info.context)
        messages = list(state.request.messages)
        head = next((i for i, m in enumerate(messages) if m.role is not Role.SYSTEM), len(messages) - 1)
        dropped = 0
        while (tokens := sum(len(WORD.findall(m.text)) for m in messages)) > limit:
            following = [i for i, m in enumerate(messages) if i > head and m.role is Role.USER]
            if not following:
                raise PromptTooLong(tokens=tokens, limit=limit)
            dropped += following[0] - head
            del messages[head : following[0]]
        state.prompt_tokens = tokens
        self._counter.prompt_tokens += tokens
        self._counter.waited.add(time.monotonic() - state.submitted)
        self._open.put(state, Started(tokens, dropped=dropped))
