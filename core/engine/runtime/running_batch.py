"""Rows of the running batch: which request has which, what it starts from, what it leaves behind.

Rows past their prompt come first, then the one that is still in prefill; when a row ends, later rows move up.
"""

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from core.engine.out_of_memory import is_out_of_memory
from core.engine.runtime.prefix_cache import CachedPrefix, PrefixCache
from core.engine.runtime.roofline import weight_bytes
from core.engine.runtime.runner import Runner
from core.engine.scheduling.request_state import RequestPhase, RequestState

log = logging.getLogger(__name__)

RowTokens = tuple[RequestState, Sequence[int]]  # token ids that a pass computes for a request


class RunningBatch:
    """The running requests, at most `most`, and the prefixes kept between turns. Owns the runner.

    All methods belong to the model thread.
    """

    def __init__(self, runner: Runner, *, most: int, reuse_bytes: int) -> None:
        self.runner, self.most = runner, most
        self.prefixes = PrefixCache(reuse_bytes)
        self.states: list[RequestState] = []  # by row; all but perhaps the last are past their prompt
        self._out_of_memory = False  # for another row
        self._weight_bytes = weight_bytes(runner.module)

    @property
    def full(self) -> bool:
        """Whether a row has to end before another request can get one."""
        return len(self.states) == self.most or self._out_of_memory

    def has_slot(self, state: RequestState) -> bool:
        """Whether there is a slot for the request's adapter."""
        return state.adapter is None or self.runner.lora.has_slot(state.adapter.sha256)

    def enter(self, state: RequestState) -> None:
        """Give a request the next row with its adapter and its conversation's prefix. On an error nothing changes."""
        state.admitted = time.monotonic()
        try:
            state.slot = None if state.adapter is None else self.runner.lora.acquire(state.adapter)
            row = self.runner.cache.add_row(len(state.prompt) + len(state.answer))
            self._reuse(state, row)
        except Exception:
            if self.runner.cache.rows > len(self.states):  # the row without a request
                self.runner.cache.wipe(len(self.states))
                self.runner.cache.drop_last()
            self._release(state)
            raise
        state.phase = RequestPhase.RUNNING
        self.states.append(state)

    def free_memory(self) -> bool:
        """After an out-of-memory error for another row: drop the prefixes. Whether a retry makes sense, now or after a
        row ends.
        """
        dropped = self.drop_prefixes()
        self._out_of_memory = bool(self.states) and not dropped
        return dropped or self._out_of_memory

    def run(self, parts: Sequence[RowTokens]) -> list[tuple[Sequence[RowTokens], Tensor | Exception]]:
        """Logits of the first rows, which compute these tokens; an error for each row that cannot go on."""
        return self._by_halves(0, parts) if parts else []

    def _by_halves(
        self, first: int, parts: Sequence[RowTokens]
    ) -> list[tuple[Sequence[RowTokens], Tensor | Exception]]:
        """Logits of rows [first, first + len(parts)). A failed pass is retried in halves, so that only the rows that
        cause the failure end.
        """
        try:
            slots = [state.slot for state, _ in parts]
            return [(parts, self.runner.run(first, [part for _, part in parts], slots))]
        except Exception as error:
            log.exception("engine.pass_failed", extra={"rows": len(parts)})
            again = is_out_of_memory(error) and self.drop_prefixes()
            if len(parts) == 1 and not again:
                return [(parts, error)]
        if again:
            return self._by_halves(first, parts)
        half = len(parts) // 2
        return self._by_halves(first, parts[:half]) + self._by_halves(first + half, parts[half:])

    def drop_prefixes(self) -> bool:
        """Drop all prefixes to free memory. Whether there were any."""
        found = len(self.prefixes) > 0
        self.prefixes.clear()
        return found

    def minimum_bytes(self) -> int:
        """Bytes that a pass of one token per row must read: weights, adapters, keys and values."""
        adapters = {state.slot: state.adapter_bytes for state in self.states}
        return self._weight_bytes + sum(adapters.values()) + self.runner.cache.used_bytes

    def leave(self, state: RequestState, *, keep: bool) -> None:
        """Take a request out of its row. With `keep`, its keys and values are stored for the next turn or its
        resumption.
        """
        row = self.states.index(state)
        if keep:
            self._keep(state, row)
        self._wipe(row)
        self._release(state)

    def clear(self) -> list[RequestState]:
        """Take all requests out of their rows, whose state is unknown, and free the rows' memory."""
        states, self.states = self.states, []
        self._out_of_memory = False
        self.runner.cache.clear()
        for state in states:
            self._release(state)
        return states

    def _wipe(self, row: int) -> None:
        """Wipe a row and close the gap: the last row past its prompt moves up, then the one in prefill."""
        cache = self.runner.cache
        cache.wipe(row)
        last = len(self.states) - 1
        last_past_prompt = max((i for i, state in enumerate(self.states) if state.uncomputed <= 1), default=0)
        for source in (last_past_prompt, last):
            if source > row:
                cache.move(source, row)
                self.states[row] = self.states[source]
                row = source
        self.states.pop()
        cache.drop_last()
        self._out_of_memory = False

    def _release(self, state: RequestState) -> None:
        """The request has no row any more: release its adapter, count its time."""
        if state.slot is not None and state.adapter is not None:
            self.runner.lora.release(state.adapter.sha256)
        if state.admitted is not None:
            state.row_s += time.monotonic() - state.admitted
        state.slot = state.admitted = None
        state.computed, state.phase = 0, RequestPhase.READY

    def _reuse(self, state: RequestState, row: int) -> None:
        """Start from the conversation's cached prefix."""
        found = self.prefixes.find(state.request.scope, state.adapter_sha256, (*state.prompt, *state.answer))
        if found is None:
            return
        kept, count = found
        try:
            self.runner.cache.put_in(row, kept.tensors, count)
            state.computed = count
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            log.warning("engine.prefix_no_memory", extra={"kept": len(self.prefixes)})
            self.runner.cache.wipe(row)
            self.prefixes.clear()

    def _keep(self, state: RequestState, row: int) -> None:
        """Store the row's keys and values for the next turn or the request's resumption."""
        cache, scope = self.runner.cache, state.request.scope
        if not self.prefixes.accepts(scope, cache.row_bytes(row)):
            return
        ids = (*state.prompt, *state.answer)[: cache.used[row]]
        try:
            self.prefixes.put(scope, CachedPrefix(state.adapter_sha256, ids, cache.take_out(row)))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            log.warning("engine.prefix_no_memory", extra={"kept": len(self.prefixes)})
            self.prefixes.clear()
