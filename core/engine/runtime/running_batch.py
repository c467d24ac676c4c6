"""The rows that run: which job has which, what it begins with, what it leaves behind. Knows no queue, threads or text.

Rows past their prompt come first, then the one that is still taking it in; when one ends, later rows move up.
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

RowTokens = tuple[RequestState, Sequence[int]]  # the ids that a pass takes in for a job


class RunningBatch:
    """The jobs that run, at most `most`, and what is kept of conversations between turns. Owns the runner.

    All methods belong to the model thread.
    """

    def __init__(self, runner: Runner, *, most: int, reuse_bytes: int) -> None:
        self.runner, self.most = runner, most
        self.prefixes = PrefixCache(reuse_bytes)
        self.jobs: list[RequestState] = []  # index is the row; past their prompt but perhaps the last
        self._short = False  # of memory, for a row more
        self._weight_bytes = weight_bytes(runner.module)

    @property
    def full(self) -> bool:
        """Whether no job gets a row before another has left its own."""
        return len(self.jobs) == self.most or self._short

    def has_room(self, job: RequestState) -> bool:
        """Whether there is a slot for the job's adapter."""
        return job.adapter is None or self.runner.lora.has_room(job.adapter.sha256)

    def enter(self, job: RequestState) -> None:
        """Give a job the next row, with its adapter and what is kept of its conversation. All of it or, after an error,
        nothing."""
        job.admitted = time.monotonic()
        try:
            job.slot = None if job.adapter is None else self.runner.lora.acquire(job.adapter)
            row = self.runner.cache.add_row(len(job.prompt) + len(job.answer))
            self._reuse(job, row)
        except Exception:
            if self.runner.cache.rows > len(self.jobs):  # a row that nobody will own
                self.runner.cache.wipe(len(self.jobs))
                self.runner.cache.drop_last()
            self._release(job)
            raise
        job.state = RequestPhase.RUNNING
        self.jobs.append(job)

    def seek_memory(self) -> bool:
        """Memory was short for a row more: what is kept for later turns goes. Whether there may be enough now, or when
        another row has ended."""
        dropped = self.drop_kept()
        self._short = bool(self.jobs) and not dropped
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
            slots = [job.slot for job, _ in parts]
            return [(parts, self.runner.run(first, [part for _, part in parts], slots))]
        except Exception as error:
            log.exception("engine.pass_failed", extra={"rows": len(parts)})
            again = is_out_of_memory(error) and self.drop_kept()
            if len(parts) == 1 and not again:
                return [(parts, error)]
        if again:
            return self._by_halves(first, parts)
        half = len(parts) // 2
        return self._by_halves(first, parts[:half]) + self._by_halves(first + half, parts[half:])

    def drop_kept(self) -> bool:
        """Memory is short: give up what is kept for later turns. Whether there was anything."""
        found = len(self.prefixes) > 0
        self.prefixes.clear()
        return found

    def least_bytes(self) -> int:
        """What a pass of one token for each row must read: weights, adapters, keys and values."""
        adapters = {job.slot: job.adapter_bytes for job in self.jobs}
        return self._weight_bytes + sum(adapters.values()) + self.runner.cache.used_bytes

    def leave(self, job: RequestState, *, keep: bool) -> None:
        """Take a job out of its row; with `keep`, the next turn or its own rest may begin with what it leaves there."""
        row = self.jobs.index(job)
        if keep:
            self._keep(job, row)
        self._wipe(row)
        self._release(job)

    def clear(self) -> list[RequestState]:
        """Nothing is known of the rows any more: take all jobs out of them, and give their memory back."""
        jobs, self.jobs = self.jobs, []
        self._short = False
        self.runner.cache.clear()
        for job in jobs:
            self._release(job)
        return jobs

    def _wipe(self, row: int) -> None:
        """Wipe a row and close the gap: the last row past its prompt moves up, then the one that is still filling."""
        cache = self.runner.cache
        cache.wipe(row)
        last = len(self.jobs) - 1
        last_past_prompt = max((i for i, job in enumerate(self.jobs) if job.behind <= 1), default=0)
        for source in (last_past_prompt, last):
            if source > row:
                cache.move(source, row)
                self.jobs[row] = self.jobs[source]
                row = source
        self.jobs.pop()
        cache.drop_last()
        self._short = False

    def _release(self, job: RequestState) -> None:
        """The row's adapter and time: the job has no row any more."""
        if job.slot is not None and job.adapter is not None:
            self.runner.lora.release(job.adapter.sha256)
        if job.admitted is not None:
            job.row_s += time.monotonic() - job.admitted
        job.slot = job.admitted = None
        job.filled, job.state = 0, RequestPhase.READY

    def _reuse(self, job: RequestState, row: int) -> None:
        """Begin with what is kept of the conversation."""
        found = self.prefixes.find(job.request.scope, job.adapter_sha256, (*job.prompt, *job.answer))
        if found is None:
            return
        kept, count = found
        try:
            self.runner.cache.put_in(row, kept.tensors, count)
            job.filled = count
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            log.warning("engine.reuse_no_memory", extra={"kept": len(self.prefixes)})
            self.runner.cache.wipe(row)
            self.prefixes.clear()

    def _keep(self, job: RequestState, row: int) -> None:
        """Keep what an answer leaves in its row, for the next turn or its own rest."""
        cache, scope = self.runner.cache, job.request.scope
        if not self.prefixes.wants(scope, cache.row_bytes(row)):
            return
        ids = (*job.prompt, *job.answer)[: cache.used[row]]
        try:
            self.prefixes.put(scope, CachedPrefix(job.adapter_sha256, ids, cache.take_out(row)))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            log.warning("engine.reuse_no_memory", extra={"kept": len(self.prefixes)})
            self.prefixes.clear()
