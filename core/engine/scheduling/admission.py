"""The waiting queue: requests between submit and a row.

The scheduler decides whose turn it is. Two cases need more than that. When every row is taken and another party holds
two more rows than the next one, one of its rows is preempted (`urgent`). A request whose adapter finds no slot lets
others pass, at most `max_rows` of them; then the adapter with the fewest rows gets no more, so that its slot becomes
free, while the other rows are filled as before.
"""

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

LOOKAHEAD = 2  # requests prepared beyond the free rows, so that no row idles while a prompt is rendered
INITIAL_ROW_S = 10.0  # estimate of a request's time in a row before the first one ended

Prepare = Callable[[RequestState], tuple[RenderedPrompt, Future[AdapterWeights] | None]]
Spawn = Callable[[Callable[[], None]], object]


class WaitingQueue:
    """Requests without a row. Methods may be called from any thread unless they name one; `lock` is notified of
    changes.
    """

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
        self.failed: list[tuple[RequestState, AppError]] = []  # the model thread ends them
        self._prepare, self._spawn, self._translate = prepare, spawn, translate
        self._scheduler: Scheduler[RequestState] = Scheduler(settings.max_waiting)
        self._preparing: set[RequestState] = set()
        self._ready: deque[RequestState] = deque()
        self._mean_row_s = INITIAL_ROW_S

    def __len__(self) -> int:
        return len(self._scheduler) + len(self._preparing) + len(self._ready)

    def states(self) -> list[RequestState]:
        with self.lock:
            return [*self._scheduler.items(), *self._preparing, *self._ready]

    def add(self, state: RequestState) -> None:
        """Queue a request. Raises Overloaded; may displace another request, see Scheduler.add."""
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
        """Requeue a preempted request, right after the urgent ones."""
        with self.lock:
            state.phase, state.urgent = RequestPhase.READY, False
            self._ready.insert(sum(other.urgent for other in self._ready), state)

    def leave(self, state: RequestState) -> None:
        """Forget a request that has ended, wherever it was."""
        with self.lock:
            if state.row_s:
                self._mean_row_s += 0.1 * (state.row_s - self._mean_row_s)
            self._preparing.discard(state)
            if state in self._ready:
                self._ready.remove(state)
            # A displaced request has left the scheduler already; one past WAITING counts as running there.
            if not self._scheduler.remove(state) and state.phase is not RequestPhase.WAITING:
                self._scheduler.done(state.request.scope)
            state.phase = RequestPhase.ENDED

    def has_work(self, rows: Sequence[RequestState]) -> bool:
        """Whether the model thread has anything to do here, given its rows."""
        return bool(self._ready or self.failed or self._takeable(len(rows)))

    def prepare_next(self, rows: Sequence[RequestState], has_slot: Callable[[RequestState], bool]) -> None:
        """Start preparing the requests whose turn it is. On the model thread."""
        with self.lock:
            held_up = len(self._ready) - len(self._may_go(rows, has_slot))
            for _ in range(self._takeable(len(rows), held_up)):
                self._begin_next()
            begun = (*self._preparing, *self._ready)
            for state in begun:  # the rows may have changed since
                state.urgent = state.urgent and self._preemptible(state, rows) is not None
            if len(rows) == self.settings.max_rows and not any(state.urgent for state in begun):
                following = self._scheduler.peek()
                if following is not None and self._preemptible(following, rows) is not None:
                    self._begin_next().urgent = True

    def preemptible_row(self, rows: Sequence[RequestState], has_slot: Callable[[RequestState], bool]) -> int | None:
        """The row to preempt for a ready request, which becomes the first in line. On the model thread."""
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
        """Remove and return the request that gets a free row. On the model thread.

        A request without an adapter slot lets as many others pass as there are rows. After that others still pass, but
        none with the adapter that has the fewest rows: when these end, the request gets their slot.
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
        """Ready requests with a slot, in order, without those of an adapter that is being drained."""
        found, ending = [], ""
        for state in self._ready:
            if has_slot(state) and not (ending and state.adapter_sha256 == ending):
                found.append(state)
            elif state.bypassed >= self.settings.max_rows:
                ending = ending or _least_used(rows)
        return found

    def _takeable(self, rows: int, held_up: int = 0) -> int:
        """Number of requests to take from the scheduler now. Those waiting for a slot or an adapter file do not block
        others, within a bound.
        """
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
        except RuntimeError as error:  # the system is out of threads
            self._fail(state, error)
        return state

    def _prepare_request(self, state: RequestState) -> None:
        """Render the prompt, on a worker thread. The adapter's file is read elsewhere."""
        try:
            prompt, adapter = self._prepare(state)
        except Exception as error:  # the tokenizer may raise anything
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
                return  # it has ended meanwhile
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
        """retry_after_s: when those who wait now will have had their rows."""
        return Overloaded(retry_after_s=max(1.0, round(len(self) / self.settings.max_rows * self._mean_row_s, 1)))


def _least_used(rows: Sequence[RequestState]) -> str:
    """The adapter with the fewest rows."""
    counts = Counter(state.adapter_sha256 for state in rows if state.adapter is not None)
    return min(counts, key=lambda adapter: counts[adapter], default="")
