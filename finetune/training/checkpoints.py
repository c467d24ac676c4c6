"""When checkpoints are written and which one resumes a job. On a full disk a job waits for space."""

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
CHECKPOINT_SHARE = 0.05  # of the time at most; slow writes make checkpoints rarer
WAIT_S, TELL_WAIT_S, LONGEST_WAIT_S = 2.0, 120.0, 6 * 3600.0  # while the disk is full


class Interrupted(Exception):
    """The job was stopped, after a checkpoint."""


class Checkpoints:
    """Checkpoints of one job. `warn` takes the message key of a warning and its fields."""

    def __init__(
        self,
        folder: Path,
        identity: str,
        trained: Trained,
        optimizer: torch.optim.Optimizer,
        *,
        group: ProcessGroup,
        stop: threading.Event,
        warn: Callable[..., None],
    ) -> None:
        self._folder, self._identity, self._trained, self._optimizer = folder / CHECKPOINT, identity, trained, optimizer
        self._team, self._stop, self._warn = group, stop, warn
        self._next = -math.inf  # of time.monotonic

    def begin(self) -> Position:
        """Position of the newest checkpoint, or a new one at step 0, which is written. Raises as `write`."""
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
        """Load model and optimiser; None, with nothing changed, without a valid checkpoint of this job."""
        return load_checkpoint(self._folder, name, self._identity, self._trained, self._optimizer)

    def is_due(self, at: float) -> bool:
        """Whether the next checkpoint is due, as rank 0 decides. Collective."""
        return self._team.led(at >= self._next)

    def save(self, position: Position) -> None:
        """Write the newest checkpoint. Raises as `write`."""
        began = time.monotonic()
        self.write(NEWEST, position)
        self._next = began + max(CHECKPOINT_S, (time.monotonic() - began) / CHECKPOINT_SHARE)

    def write(self, name: str, position: Position) -> None:
        """Raises Interrupted, JobError."""
        writes = self._team.leads
        self.with_space(
            lambda: save_checkpoint(self._folder, name, position, self._trained, self._optimizer, write=writes),
            step=position.step,
        )
        self._team.wait()

    def with_space(self, write: Callable[[], None], *, step: int) -> None:
        """Write, waiting for disk space. Raises Interrupted, JobError."""
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
                raise Interrupted  # not collective: the other processes do not write


def identity_of(spec: Spec, prepared: Prepared, own_sha256: str, settings: Resolved) -> str:
    """Hash of everything that determines the result (not threads, niceness, paths)."""
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
