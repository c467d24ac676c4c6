"""When a job's checkpoints are written, and what of them may be gone on from. Knows no data and no model.

Where the disk is full it waits: others may make room, and a job is not lost for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from core.errors import JobError
from core.jobs.protocol import Spec
from finetune.modeling.methods import Trained
from finetune.position import Position
from finetune.prepare import Prepared
from finetune.process_group import ProcessGroup
from finetune.settings import Resolved
from finetune.training.checkpoint import BEST, NEWEST, is_disk_full, load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
CHECKPOINT_S = 20.0
CHECKPOINT_SHARE = 0.05  # of the time: where writing one takes long, they become rarer
WAIT_S, TELL_WAIT_S, LONGEST_WAIT_S = 2.0, 120.0, 6 * 3600.0  # where the disk is full


class Interrupted(Exception):
    """The job is to stop; its checkpoint is written."""


class Checkpoints:
    """The checkpoints of one job, in a folder of their own. `warn` takes the key of a warning and its fields."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        trained: Trained,
        optimizer: torch.optim.Optimizer,
        *,
        team: ProcessGroup,
        stop: threading.Event,
        warn: Callable[..., None],
    ) -> None:
        self._folder, self._identity, self._trained, self._optimizer = folder / CHECKPOINT, identity, trained, optimizer
        self._team, self._stop, self._warn = team, stop, warn
        self._next = -math.inf  # of time.monotonic

    def begin(self) -> Position:
        """Where the job stands: at its newest checkpoint, or at the start, which is written. Raises as `write`."""
        position = self.load(NEWEST)
        if position is not None:
            return position
        if self._team.led(self._folder.exists()):
            self._warn("checkpoint")
        self._team.wait()
        if self._team.leads:
            shutil.rmtree(self._folder, ignore_errors=True)
        position = Position(self._identity)
        for name in (BEST, NEWEST):
            self.write(name, position)
        return position

    def load(self, name: str) -> Position | None:
        """Put it into model and optimiser; None, and nothing touched, where there is none of this job."""
        return load_checkpoint(self._folder, name, self._identity, self._trained, self._optimizer)

    def is_due(self, at: float) -> bool:
        """Whether the newest one is so old, at this time, that all of the team write another."""
        return self._team.led(at >= self._next)

    def save(self, position: Position) -> None:
        """The newest one. Raises as `write`."""
        began = time.monotonic()
        self.write(NEWEST, position)
        self._next = began + max(CHECKPOINT_S, (time.monotonic() - began) / CHECKPOINT_SHARE)

    def write(self, name: str, position: Position) -> None:
        """Raises Interrupted, JobError."""
        writes = self._team.leads
        self.with_room(
            lambda: save_checkpoint(self._folder, name, position, self._trained, self._optimizer, write=writes),
            step=position.step,
        )
        self._team.wait()

    def with_room(self, write: Callable[[], None], *, step: int) -> None:
        """Write, as soon as the disk has room for it. Raises Interrupted, JobError."""
        until, told = time.monotonic() + LONGEST_WAIT_S, -math.inf
        while True:
            try:
                return write()
            except (OSError, SafetensorError) as error:
                if not is_disk_full(error) or time.monotonic() > until:
                    why = getattr(error, "strerror", None) or str(error)
                    detail = f"the job folder cannot be written: {error}"
                    raise JobError("training.why_folder", detail, error=why) from error
            if time.monotonic() - told > TELL_WAIT_S:
                told = time.monotonic()
                self._warn("disk_full", step=step)
                log.warning("train.disk_full step=%d", step)
            if self._stop.wait(WAIT_S):
                raise Interrupted  # the others do something else, or nothing: they are not asked


def identity_of(spec: Spec, prepared: Prepared, own_sha256: str, settings: Resolved) -> str:
    """Of all that decides a job's result. Threads, niceness and paths do not."""
    base = prepared.base
    given = asdict(spec)
    names = ("job", "label", "instructions", "data_sha256", "dtype", "method", "fresh", "hyper")
    known = {name: given[name] for name in names}
    known |= {
        "own": own_sha256,
        "trained": [prepared.encoded[number].key for number in prepared.split.train],
        "base": base.fingerprint,
        "template": base.template_sha256,
        "resolved": asdict(settings),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
