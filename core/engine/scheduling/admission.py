"""The waiting queue: requests between submit and a row.

The scheduler decides whose turn it is. Two cases need more than that. When every row is taken and another party holds
two more rows than the next one, one of its rows is preempted (`urgent`). A request whose adapter finds no slot lets
others pass, at most `max_rows` of them; then the adapter with the fewest rows gets no more, so that its slot becomes
free, while the other rows are filled as before.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from core.config.sections import EngineSettings
from core.engine.lora.adapter_files import AdapterWeights
from core.engine.scheduling.request_state import RequestPhase, RequestState
from core.engine.scheduling.scheduler import PROMPT_COST, QueueFull, Scheduler, row_to_preempt
from core.errors import AppError, Overloaded
from core.model.chat_format import RenderedPrompt

log = logging.getLogger(__name__)

LOOKAHEAD = 2  # states prepared beyond the free rows, so that none waits for its adapter file while a row is free
FIRST_GUESS_S = 10.0  # of how long one request takes, before any has been seen

Prepare = Callable[[RequestState], tuple[RenderedPrompt, Future[AdapterWeights] | None]]
Spawn = Callable[[Callable[[], None]], object]


class WaitingQueue:
    """Methods may be called from any thread, but for those that say otherwise. `lock` is notified of what is new."""

    def __init__(
        self,
        settings: EngineSettings,
        lock: threading.Condition,
        *,
        prepare: Prepare,
        spawn: Spawn,
        translate: Callable[[BaseException], AppError],
    ) -> None:
        self.settings, self.lock = settings, lock
        self.failed: list[tuple[RequestState, AppError]] = []  # to be ended by the model thread
        self._prepare, self._spawn, self._translate = prepare, spawn, translate
        self._scheduler: Scheduler[RequestState] = Scheduler(settings.max_waiting)
        self._preparing: set[RequestState] = set()
        self._ready: deque[RequestState] = deque()
        self._mean_row_s = FIRST_GUESS_S

    def __len__(self) -> int:
        return len(self._scheduler) + len(self._preparing) + len(self._ready)

    def states(self) -> list[RequestState]:
        with self.lock:
            return [*self._scheduler.items(), *self._preparing, *self._ready]

    def add(self, state: RequestState) -> None:
        """Let a state wait for its turn. Raises Overloaded; another state may have to go for it, see Scheduler.add."""
        with self.lock:
            try:
                displaced = self._scheduler.add(state, state.request.scope)
            except QueueFull:
                raise self._overloaded() from None
            if displaced is not None:
                self.failed.append((displaced, self._overloaded()))
            self.lock.notify()

    def charge(self, state: RequestState, cost: int) -> None:
        with self.lock:
            self._scheduler.charge(state.request.scope, cost)

    def put_back(self, state: RequestState) -> None:
        """A paused row's state: the first to go on after the one that it made room for."""
        with self.lock:
            state.phase, state.urgent = RequestPhase.READY, False
            self._ready.insert(sum(other.urgent for other in self._ready), state)

    def leave(self, state: RequestState) -> None:
        """The state is over, wherever it was."""
        with self.lock:
            if state.row_s:
                self._mean_row_s += 0.1 * (state.row_s - self._mean_row_s)
            self._preparing.discard(state)
            if state in self._ready:
                self._ready.remove(state)
            # Displaced states have left the scheduler already, others than waiting ones count as running in it.
            if not self._scheduler.remove(state) and state.phase is not RequestPhase.WAITING:
                self._scheduler.done(state.request.scope)
            state.phase = RequestPhase.ENDED

    def has_work(self, rows: Sequence[RequestState]) -> bool:
        """Whether the model thread, with these rows, has anything to do here."""
        return bool(self._ready or self.failed or self._takeable(len(rows)))

    def prepare_next(self, rows: Sequence[RequestState], has_slot: Callable[[RequestState], bool]) -> None:
        """Send those whose turn it is to be prepared. On the model thread."""
        with self.lock:
            held_up = len(self._ready) - len(self._may_go(rows, has_slot))
            for _ in range(self._takeable(len(rows), held_up)):
                self._begin_next()
            begun = (*self._preparing, *self._ready)
            for state in begun:  # the rows may be others than when room was to be made for it
                state.urgent = state.urgent and self._preemptible(state, rows) is not None
            if len(rows) == self.settings.max_rows and not any(state.urgent for state in begun):
                following = self._scheduler.peek()
                if following is not None and self._preemptible(following, rows) is not None:
                    self._begin_next().urgent = True

    def preemptible_row(self, rows: Sequence[RequestState], has_slot: Callable[[RequestState], bool]) -> int | None:
        """The row that is to make room for a ready state, which is the first then. On the model thread."""
        if len(rows) < self.settings.max_rows:
            return None
        with self.lock:
            for state in self._ready:
                row = self._preemptible(state, rows) if has_slot(state) else None
                if row is not None:
                    self._ready.remove(state)
                    self._ready.appendleft(state)
                    state.urgent = True
                    return row
        return None

    def next_ready(self, rows: Sequence[RequestState], has_slot: Callable[[RequestState], bool]) -> RequestState | None:
        """The state that gets a free row beside these, out of the queue. On the model thread.

        One whose adapter finds no slot lets others pass, as many as there are rows; after that they still pass, but
        none with the adapter that has the fewest rows: these end, and it goes on in their slot.
        """
        with self.lock:
            state = next(iter(self._may_go(rows, has_slot)), None)
            if state is not None:
                for other in self._ready:
                    if other is state:
                        break
                    other.bypassed += 1
                self._ready.remove(state)
            return state

    def _may_go(self, rows: Sequence[RequestState], has_slot: Callable[[RequestState], bool]) -> list[RequestState]:
        """Those that are ready and would find a slot, in order, without those of the adapter that is to end."""
        found, ending = [], ""
        for state in self._ready:
            if has_slot(state) and not (ending and state.adapter_sha256 == ending):
                found.append(state)
            elif state.bypassed >= self.settings.max_rows:
                ending = ending or _least_used(rows)
        return found

    def _takeable(self, rows: int, held_up: int = 0) -> int:
        """How many may be taken from the queue now. Those that wait for a slot or for their adapter's file hold up no
        others, within a bound."""
        begun = len(self._preparing) + len(self._ready)
        held_up += sum(state.phase is RequestPhase.READING for state in self._preparing)
        free = min(self.settings.max_rows - rows + LOOKAHEAD - begun + held_up, 2 * self.settings.max_rows - begun)
        return max(0, min(len(self._scheduler), free))

    def _preemptible(self, state: RequestState, rows: Sequence[RequestState]) -> int | None:
        return row_to_preempt(state.request.scope, [row.request.scope for row in rows])

    def _begin_next(self) -> RequestState:
        state = self._scheduler.take()
        assert state is not None
        state.phase = RequestPhase.PREPARING
        self._preparing.add(state)
        try:
            self._spawn(lambda: self._prepare_request(state))
        except RuntimeError as error:  # no more threads
            self._fail(state, error)
        return state

    def _prepare_request(self, state: RequestState) -> None:
        """On another thread: render the prompt. Nothing here waits for an adapter's file."""
        try:
            prompt, adapter = self._prepare(state)
        except Exception as error:  # a tokenizer's own error must not leave the state hanging
            self._fail(state, error)
        else:
            if adapter is None:
                self._make_ready(state, prompt, None)
                return
            with self.lock:
                if state.phase is RequestPhase.PREPARING:
                    state.phase = RequestPhase.READING
                    self.lock.notify()
            adapter.add_done_callback(lambda read: self._attach(state, prompt, read))

    def _attach(self, state: RequestState, prompt: RenderedPrompt, read: Future[AdapterWeights]) -> None:
        error = read.exception()
        if error is None:
            self._make_ready(state, prompt, read.result())
        else:
            self._fail(state, error)

    def _make_ready(self, state: RequestState, prompt: RenderedPrompt, weights: AdapterWeights | None) -> None:
        with self.lock:
            if state not in self._preparing:
                return  # cancelled or late meanwhile
            self._preparing.remove(state)
            state.prompt, state.dropped, state.adapter = prompt.ids, prompt.dropped, weights
            state.adapter_bytes = 0 if weights is None else weights.nbytes
            state.phase = RequestPhase.READY
            self._scheduler.charge(state.request.scope, PROMPT_COST * len(state.prompt))
            self._ready.append(state)
            self.lock.notify()

    def _fail(self, state: RequestState, error: BaseException) -> None:
        if not isinstance(error, AppError):
            log.error("engine.prepare_failed", exc_info=error)
        with self.lock:
            if state in self._preparing:
                self._preparing.remove(state)
                self.failed.append((state, self._translate(error)))
                self.lock.notify()

    def _overloaded(self) -> Overloaded:
        """Come back when those who wait now have had their rows."""
        return Overloaded(retry_after_s=max(1.0, round(len(self) / self.settings.max_rows * self._mean_row_s, 1)))


def _least_used(rows: Sequence[RequestState]) -> str:
    """The adapter with the fewest rows. As long as it gets no more, the fewest become fewer."""
    counts = Counter(state.adapter_sha256 for state in rows if state.adapter is not None)
    return min(counts, key=lambda adapter: counts[adapter], default="")
