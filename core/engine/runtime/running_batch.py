"""Rows of the running batch: which request has which, what it starts from, what it leaves behind.

Rows past their prompt come first, then the one that is still in prefill; when a row ends, later rows move up.
"""

from __future__ import annotations

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

RowTokens = tuple[RequestState, Sequence[int]]  # the ids that a pass takes in for a state


class RunningBatch:
    """The states that run, at most `most`, and what is kept of conversations between turns. Owns the runner.

    All methods belong to the model thread.
    """

    def __init__(self, runner: Runner, *, most: int, reuse_bytes: int) -> None:
        self.runner, self.most = runner, most
        self.prefixes = PrefixCache(reuse_bytes)
        self.states: list[RequestState] = []  # index is the row; past their prompt but perhaps the last
        self._short = False  # of memory, for a row more
        self._weight_bytes = weight_bytes(runner.module)

    @property
    def full(self) -> bool:
        """Whether no state gets a row before another has left its own."""
        return len(self.states) == self.most or self._short

    def has_slot(self, state: RequestState) -> bool:
        """Whether there is a slot for the state's adapter."""
        return state.adapter is None or self.runner.lora.has_slot(state.adapter.sha256)

    def enter(self, state: RequestState) -> None:
        """Give a request the next row with its adapter and its conversation's prefix. On an error nothing changes."""
        state.admitted = time.monotonic()
        try:
            state.slot = None if state.adapter is None else self.runner.lora.acquire(state.adapter)
            row = self.runner.cache.add_row(len(state.prompt) + len(state.answer))
            self._reuse(state, row)
        except Exception:
            if self.runner.cache.rows > len(self.states):  # a row that nobody will own
                self.runner.cache.wipe(len(self.states))
                self.runner.cache.drop_last()
            self._release(state)
            raise
        state.phase = RequestPhase.RUNNING
        self.states.append(state)

    def free_memory(self) -> bool:
        """Memory was short for a row more: what is kept for later turns goes. Whether there may be enough now, or when
        another row has ended."""
        dropped = self.drop_prefixes()
        self._short = bool(self.states) and not dropped
        return dropped or self._short

    def run(self, parts: Sequence[RowTokens]) -> list[tuple[Sequence[RowTokens], Tensor | Exception]]:
        """Logits of the first rows, which take in these parts; an error for each that cannot go on."""
        return self._by_halves(0, parts) if parts else []

    def _by_halves(
        self, first: int, parts: Sequence[RowTokens]
    ) -> list[tuple[Sequence[RowTokens], Tensor | Exception]]:
        """Logits of rows [first, first + len(parts)). A pass that fails, for memory or for one row's sake, is run again
        in halves, so that only those end that cannot go on alone."""
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
        """Memory is short: give up what is kept for later turns. Whether there was anything."""
        found = len(self.prefixes) > 0
        self.prefixes.clear()
        return found

    def minimum_bytes(self) -> int:
        """What a pass of one token for each row must read: weights, adapters, keys and values."""
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
        """Nothing is known of the rows any more: take all states out of them, and give their memory back."""
        states, self.states = self.states, []
        self._short = False
        self.runner.cache.clear()
        for state in states:
            self._release(state)
        return states

    def _wipe(self, row: int) -> None:
        """Wipe a row and close the gap: the last row past its prompt moves up, then the one that is still filling."""
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
        self._short = False

    def _release(self, state: RequestState) -> None:
        """The row's adapter and time: the state has no row any more."""
        if state.slot is not None and state.adapter is not None:
            self.runner.lora.release(state.adapter.sha256)
        if state.admitted is not None:
            state.row_s += time.monotonic() - state.admitted
        state.slot = state.admitted = None
        state.computed, state.phase = 0, RequestPhase.READY

    def _reuse(self, state: RequestState, row: int) -> None:
        """Begin with what is kept of the conversation."""
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
        """Keep what an answer leaves in its row, for the next turn or its own rest."""
        cache, scope = self.runner.cache, state.request.scope
        if not self.prefixes.accepts(scope, cache.row_bytes(row)):
            return
        ids = (*state.prompt, *state.answer)[: cache.used[row]]
        try:
            self.prefixes.put(scope, CachedPrefix(state.adapter_sha256, ids, cache.take_out(row)))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            log.warning("engine.prefix_no_memory", extra={"kept": len(self.prefixes)})
            self.prefixes.clear()
