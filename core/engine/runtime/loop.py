"""The model thread: admit, run a pass, emit, cancel.

One step ends cancelled and late requests, admits ready ones and runs one pass: one token for each row past its prompt,
beside at most one chunk of prompts. Requests join and leave between steps; a row of a party with many may be preempted
for a party with none.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from core.config.sections import EngineSettings
from core.engine.out_of_memory import is_out_of_memory
from core.engine.protocol import Delta, Event, Finished, FinishReason, Started
from core.engine.runtime.runner import Runner, translate
from core.engine.runtime.running_batch import RunningBatch
from core.engine.runtime.sampling import NOT_FINITE, sample
from core.engine.scheduling.admission import Prepare, Spawn, WaitingQueue
from core.engine.scheduling.request_state import RequestPhase, RequestState
from core.engine.scheduling.scheduler import COMPLETION_COST
from core.engine.scheduling.stats import StatsCounter
from core.errors import AppError, EngineError
from core.model.base import BaseModel

log = logging.getLogger(__name__)

CHUNK_CPU, CHUNK_CUDA = 256, 1024  # prompt tokens between two decode steps
MAX_SLEEP_S = 3600.0  # a lock's timeout is bounded
KEPT_AFTER = (FinishReason.END, FinishReason.STOP, FinishReason.LENGTH)

Output = tuple[RequestState, Event | AppError]


class ModelThread:
    """Owns the rows. `start`, `submit`, `cancel`, `forget`, `stop` and the counters may be used from any thread.

    `emit` gets all events of a step at once, on the model thread; nothing follows Finished or an error. `spawn` runs a
    call on another thread, so that no prompt is rendered between two steps.
    """

    def __init__(
        self,
        model: BaseModel,
        settings: EngineSettings,
        *,
        context: int,
        prepare: Prepare,
        spawn: Spawn,
        emit: Callable[[list[Output]], None],
        counter: StatsCounter,
    ) -> None:
        self.model, self.settings, self.context = model, settings, context
        self.runner = Runner(model, max_rows=settings.max_rows, context=context, adapters=settings.adapters_at_once)
        self.rows = RunningBatch(self.runner, most=settings.max_rows, reuse_bytes=settings.reuse_mib * 2**20)
        self.chunk = CHUNK_CUDA if model.device.type == "cuda" else CHUNK_CPU
        self.counter = counter
        self._emit = emit
        self._outputs: list[Output] = []
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        # Guarded by the lock: what other threads use.
        self._wake = threading.Condition()
        self.queue = WaitingQueue(settings, self._wake, prepare=prepare, spawn=spawn, translate=translate)
        self._forgets: list[tuple[str, str, Future[None]]] = []
        self._stopping = self._over = False

    # --- from any thread

    @property
    def running(self) -> int:
        return len(self.rows.states)

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def start(self) -> None:
        self._thread.start()

    def submit(self, state: RequestState) -> None:
        """Queue a request. Raises Overloaded; may displace another request, see Scheduler.add."""
        with self._wake:
            if self._over:
                raise EngineError(detail="the model thread has ended: start the program again")
            self.queue.add(state)

    def cancel(self, state: RequestState) -> None:
        """End a request within one step; Finished still comes."""
        with self._wake:
            state.cancelled = True
            self._wake.notify()

    def forget(self, channel: str, conversation: str) -> Future[None]:
        """End the requests of a conversation (or channel) and wipe their rows. The future is done when that has
        happened.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # so that a waiter that goes away cannot cancel it
        with self._wake:
            if self._over:
                done.set_result(None)
            else:
                self._forgets.append((channel, conversation, done))
                self._wake.notify()
        return done

    def stop(self) -> None:
        """End all requests as cancelled, then the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    # --- on the model thread

    def _run(self) -> None:
        if self.settings.threads and self.model.device.type == "cpu":
            torch.set_num_threads(self.settings.threads)  # applies to the calling thread
        outcome: FinishReason | AppError = FinishReason.CANCELLED
        with torch.inference_mode():
            try:
                while self._wait_for_work():
                    try:
                        self._step()
                    except Exception as error:  # the thread survives any error of a step
                        log.exception("engine.step_failed")
                        self._fail_running(translate(error))
                    self._flush()
            except Exception as error:
                log.exception("engine.thread_failed")
                outcome = EngineError(detail=f"the model thread has ended: {type(error).__name__}: {error}")
            self._end_all(outcome)

    def _wait_for_work(self) -> bool:
        """Sleep until there is work; False when the thread is to stop."""
        with self._wake:
            while not self._stopping:
                states = self.queue.states()
                if self.rows.states or self._forgets or self.queue.has_work(self.rows.states):
                    break
                if any(state.cancelled for state in states):
                    break
                left = min((state.deadline - time.monotonic() for state in states), default=None)
                if left is not None and left <= 0:
                    break
                self._wake.wait(None if left is None else min(left, MAX_SLEEP_S))
            return not self._stopping

    def _step(self) -> None:
        self._end_cancelled_and_late()
        self.queue.prepare_next(self.rows.states, self.rows.has_slot)
        row = self.queue.preemptible_row(self.rows.states, self.rows.has_slot)
        if row is not None:
            self._preempt(self.rows.states[row])
        self._pass()

    def _end_cancelled_and_late(self) -> None:
        """End them one by one: after an error the rest follow in the next step."""
        while self.queue.failed:
            self._end(*self.queue.failed.pop(0))
        with self._wake:
            forgets = list(self._forgets)
            states = [*self.queue.states(), *self.rows.states]
        now = time.monotonic()
        for state in states:
            forgotten = any(_concerns(state, channel, conversation) for channel, conversation, _ in forgets)
            if state.cancelled or forgotten:
                self._end(state, FinishReason.CANCELLED)
            elif now >= state.deadline:
                self._end(state, FinishReason.DEADLINE)
        for channel, conversation, done in forgets:
            self.rows.prefixes.forget(channel, conversation)
            done.set_result(None)
            del self._forgets[0]

    def _pass(self) -> None:
        """Compute one token for every row past its prompt, beside a chunk of prompts: of the row in prefill, then of
        ready requests. A chunk that does not finish its prompt leaves budget for the decoding rows.
        """
        rows = self.rows.states
        parts: list[Sequence[int]] = [state.next_ids(1) for state in rows if state.uncomputed == 1]
        stepping, budget = len(parts), self.chunk
        while budget > 0:
            if len(parts) == len(rows):
                room = self.runner.cache.capacity
                if self._admit() is None or (parts and self.runner.cache.capacity != room):
                    break  # reallocation took time: the others step first
            state = rows[len(parts)]
            cut = state.uncomputed > budget
            parts.append(state.next_ids(max(budget - stepping, 1) if cut else budget))
            budget = 0 if cut else budget - len(parts[-1])
        began = time.monotonic()
        results = self.rows.run(list(zip(rows[: len(parts)], parts, strict=True)))
        minimum_bytes = self.rows.minimum_bytes() if parts and all(len(part) == 1 for part in parts) else 0
        for taken, result in results:
            for state, part in taken if isinstance(result, Tensor) else ():
                self.counter.prompt_tokens += state.mark_computed(len(part))
        for taken, result in results:  # first, so that rows past their prompt stay in front
            if isinstance(result, Exception):
                self._end(taken[0][0], translate(result))
        for taken, result in results:
            past_prompt = [state for state, _ in taken if not state.uncomputed]  # all but perhaps the last
            if isinstance(result, Tensor) and past_prompt:
                self._accept_logits(past_prompt, result[: len(past_prompt)])
        if minimum_bytes:
            self.counter.decode_s += time.monotonic() - began  # until the ids are read: a GPU works asynchronously
            self.counter.decode_bytes += minimum_bytes

    def _admit(self) -> RequestState | None:
        """Give the next ready request a row. One that lacks memory waits until another row has ended."""
        state = None if self.rows.full else self.queue.next_ready(self.rows.states, self.rows.has_slot)
        if state is None:
            return None
        waited_s = time.monotonic() - state.submitted
        try:
            self.rows.enter(state)
        except Exception as error:
            self._not_admitted(state, error)
        else:
            if not state.started:
                state.started, state.reused = True, state.computed
                self.counter.waited.add(waited_s)
                self.counter.reused_tokens += state.reused
                self._outputs.append((state, Started(len(state.prompt), state.reused, state.dropped)))
            return state
        return self._admit()  # here, where the error no longer references tensors

    def _not_admitted(self, state: RequestState, error: Exception) -> None:
        """Requeue the request if memory is all it lacks and may become free; else end it."""
        if is_out_of_memory(error) and self.rows.free_memory():
            log.warning("engine.admit_no_memory", extra={"rows": self.running, "reason": str(error)[:200]})
            self.queue.put_back(state)
        else:
            log.error("engine.admit_failed", exc_info=error)
            self._end(state, translate(error))

    def _preempt(self, state: RequestState) -> None:
        """Take a request out of its row. It resumes from its stored keys and values, or recomputes them."""
        self.rows.leave(state, keep=True)
        self.queue.put_back(state)
        log.debug("engine.preempted", extra={"answered": len(state.answer)})

    def _accept_logits(self, states: Sequence[RequestState], logits: Tensor) -> None:
        """Sample one token per row from (B, V); emit it or end the request."""
        ids = self._sample(states, logits)
        now = time.monotonic()
        for state, token in zip(states, ids, strict=True):
            if token == NOT_FINITE:
                self._end(state, EngineError(detail="the model's output is not finite; its adapter may be damaged"))
                continue
            state.answer.append(token)
            self.counter.token(now - state.submitted, None if state.last_token is None else now - state.last_token)
            state.last_token = now
            self.queue.charge(state, COMPLETION_COST)
            try:
                outcome: FinishReason | AppError | None = self._emit_token(state, token)
            except Exception as error:
                outcome = _text_error(error)
            if outcome is not None:
                self._end(state, outcome)

    def _sample(self, states: Sequence[RequestState], logits: Tensor) -> list[int]:
        """One token per row of (B, V). Out of memory, halves are sampled separately, with the same result."""
        try:
            return sample(
                logits,
                [state.request.sampling for state in states],
                [len(state.answer) for state in states],
                [
                    (*state.prompt, *state.answer) if state.request.sampling.repetition_penalty != 1 else ()
                    for state in states
                ],
            )
        except Exception as error:
            if len(states) == 1 or not is_out_of_memory(error):
                raise
            self.rows.drop_prefixes()
        half = len(states) // 2
        return self._sample(states[:half], logits[:half]) + self._sample(states[half:], logits[half:])

    def _emit_token(self, state: RequestState, token: int) -> FinishReason | None:
        """Emit the text that became certain; return the reason to end, if any."""
        if token in self.model.eos_ids:
            return FinishReason.END
        self._emit_text(state, state.scanner.push(state.detokenizer.push(token)))
        if state.scanner.hit:
            return FinishReason.STOP
        total = len(state.prompt) + len(state.answer)
        full = len(state.answer) >= state.request.sampling.max_tokens or total >= self.context
        return FinishReason.LENGTH if full else None

    def _emit_text(self, state: RequestState, text: str) -> None:
        if text:
            self._outputs.append((state, Delta(text)))

    def _end(self, state: RequestState, outcome: FinishReason | AppError) -> None:
        """Remove a request from wherever it is and emit its last event."""
        if state.phase is RequestPhase.ENDED:
            return
        if isinstance(outcome, FinishReason):
            try:
                outcome = self._last_text(state, outcome)
            except Exception as error:
                outcome = _text_error(error)
        self._outputs.append((state, Finished(outcome, state.usage) if isinstance(outcome, FinishReason) else outcome))
        if state.phase is RequestPhase.RUNNING:
            self.rows.leave(state, keep=outcome in KEPT_AFTER)
        self.queue.leave(state)
        state.prompt, state.answer, state.adapter = (), [], None

    def _last_text(self, state: RequestState, reason: FinishReason) -> FinishReason:
        """Emit the text held back, unless a stop string ended the answer; it may itself complete one."""
        if reason is FinishReason.STOP:
            return reason
        self._emit_text(state, state.scanner.push(state.detokenizer.flush()))
        if state.scanner.hit:
            return FinishReason.STOP
        self._emit_text(state, state.scanner.flush())
        return reason

    def _fail_running(self, error: AppError) -> None:
        """End all running requests: after a failed step the state of the rows is unknown."""
        for state in self.rows.clear():
            self._end(state, error)

    def _end_all(self, outcome: FinishReason | AppError) -> None:
        with self._wake:  # submit and forget find the thread over from now on
            self._over = True
            self._outputs += self.queue.failed
            for state in [*self.queue.states(), *self.rows.states]:
                try:
                    self._end(state, outcome)
                except Exception as error:  # the others have to end too
                    log.exception("engine.end_failed")
                    self._outputs.append((state, translate(error)))
            self._flush()
            try:
                self.runner.cache.clear()
                self.rows.prefixes.clear()
            finally:
                for _, _, done in self._forgets:
                    done.set_result(None)

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._emit(outputs)


def _text_error(error: Exception) -> AppError:
    """A tokenizer's error concerns one answer only."""
    log.error("engine.text_failed", exc_info=error)
    return translate(error)


def _concerns(state: RequestState, channel: str, conversation: str) -> bool:
    scope = state.request.scope
    return scope.channel == channel and (not conversation or scope.conversation == conversation)
