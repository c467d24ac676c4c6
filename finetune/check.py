"""`python -m finetune check`: validates the data, writes a preview of rows as trained, and measures time and memory.

The weights that it trains for the measurement are discarded.
"""

import threading
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from core import files
from core.jobs.protocol import PREVIEW, Preview, Spec
from core.types import Role
from finetune.data.encode import Row
from finetune.estimate import estimate
from finetune.modeling.base import TrainingBase
from finetune.prepare import Emit, prepare

SHOWN = 3


def check(folder: Path, spec: Spec, emit: Emit, stop: threading.Event) -> None:
    """Raises BadDataset, JobError, Interrupted."""
    torch.set_num_threads(spec.threads)
    prepared = prepare(folder, spec, emit)
    chosen = [as_trained(row, prepared.base) for row in to_show(prepared.encoded)]
    files.write(folder / PREVIEW, Preview.dump(chosen).encode())
    emit(estimate(folder, spec, prepared, emit, stop))


def to_show(rows: Sequence[Row]) -> list[Row]:
    """The first row, and the longest and the median of the others, in file order."""
    others = sorted(rows[1:], key=lambda row: len(row.row.ids))
    picked = [rows[0], *([others[-1], others[len(others) // 2 - 1]] if len(others) > 1 else others)]
    return sorted(picked[:SHOWN], key=lambda row: row.line)


def as_trained(row: Row, base: TrainingBase) -> Preview:
    """The tokens of a training step, decoded and marked by the loss mask."""
    runs = groupby(zip(row.row.ids, row.row.supervised, strict=True), key=lambda pair: pair[1])
    parts = tuple((taught, base.tokenizer.decode([one for one, _ in run])) for taught, run in runs)
    turns = row.served.turns
    first = next((at for at, turn in enumerate(turns) if turn.taught), None)
    if first is None:  # plain text: every token is in the loss
        return Preview(row.line, parts, "", "".join(text for _, text in parts))
    asked = next((turn.message.text for turn in reversed(turns[:first]) if turn.message.role is Role.USER), "")
    return Preview(row.line, parts, asked, turns[first].message.text)
