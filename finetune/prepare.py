"""Spec and data file -> base model, encoded rows and their split, within the limits on time and memory."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import files
from core.errors import JobError
from core.jobs.protocol import FEWEST_TEST_ROWS, Checked, JobEvent, Spec
from core.model.chat_format import TrainingRow
from finetune import settings
from finetune.data.encode import Row, encode, under_questions_of
from finetune.data.lines import bad
from finetune.data.plain_text import NOTHING, behind, encode_text, is_plain, read_text, second_half
from finetune.data.reader import Report, read
from finetune.data.redact import write_redacted
from finetune.data.split import Split, rows_missing, split
from finetune.limits import MEMORY_BYTES, SECONDS, TooCostly, bounded
from finetune.modeling.base import TrainingBase, check_device, find_base
from finetune.modeling.fresh import fresh_base

log = logging.getLogger(__name__)
Emit = Callable[[JobEvent], None]
BINS = 12  # of the length histogram


@dataclass(frozen=True, slots=True)
class Prepared:
    base: TrainingBase
    encoded: Sequence[Row]
    split: Split
    report: Report

    @property
    def rows(self) -> list[TrainingRow]:
        return [row.row for row in self.encoded]

    def part(self, numbers: Sequence[int]) -> list[TrainingRow]:
        return [self.encoded[number].row for number in numbers]

    @property
    def plain(self) -> bool:
        """Whether the data set is plain text."""
        return self.encoded[0].served is NOTHING

    def tested(self, numbers: Sequence[int]) -> list[TrainingRow]:
        """The rows as evaluated: answers, or the second half of each piece of plain text."""
        return [second_half(row) for row in self.part(numbers)] if self.plain else self.part(numbers)

    def swapped(self, numbers: Sequence[int]) -> list[TrainingRow]:
        """The same answers under the questions of another row, half the list away or the next that fits."""
        half = len(numbers) // 2
        others = [*numbers[half:], *numbers[:half]]
        if self.plain:
            pairs = zip(numbers, others, strict=True)
            return [behind(self.encoded[one].row, self.encoded[other].row) for one, other in pairs]
        return [self._swapped(number, [*others[at:], *others[:at]]) for at, number in enumerate(numbers)]

    def _swapped(self, number: int, others: Sequence[int]) -> TrainingRow:
        """The row under the first questions with which it fits the context; its own are the last resort."""
        tried = (under_questions_of(self.encoded[number], self.encoded[other], self.base.tokenizer) for other in others)
        return next(row for row in tried if len(row.ids) <= self.base.context)


def prepare(folder: Path, spec: Spec, emit: Emit) -> Prepared:
    """Check settings, base model and data; emit Checked. Raises BadDataset, JobError."""
    settings.check(spec)
    check_device(spec)
    path = folder / spec.data
    _check_data(path, spec.data_sha256)
    try:
        with bounded():
            base, rows, report = _read_rows(path, folder, spec, emit)
    except TooCostly as error:
        fields = {"seconds": round(SECONDS), "gib": MEMORY_BYTES // 2**30}
        raise bad(0, "costly_time" if error.what == "time" else "costly_memory", **fields) from error
    parts = split([row.key for row in rows])
    lengths = sorted(len(row.row.ids) for row in rows)
    emit(
        Checked(
            rows=report.rows,
            used=report.used,
            duplicates=report.duplicates,
            tokens=sum(lengths),
            train=len(parts.train),
            validation=len(parts.validation),
            test=len(parts.test),
            rejected=tuple(one.render(spec.language) for one in report.rejections),
            mended=tuple(one.render(spec.language) for one in report.noted()),
            personal=tuple(one.render(spec.language) for one in report.personal_data()),
            median_tokens=lengths[len(lengths) // 2],
            longest_tokens=lengths[-1],
            shortest_tokens=lengths[0],
            histogram=histogram(lengths),
            doubled=tuple(report.doubled),
            missing=rows_missing(len(rows), len(parts.test), FEWEST_TEST_ROWS),
        )
    )
    log.info("data.checked rows=%d used=%d rejected=%d", report.rows, report.used, report.rejected)
    return Prepared(base, rows, parts, report)


def _read_rows(path: Path, folder: Path, spec: Spec, emit: Emit) -> tuple[TrainingBase, list[Row], Report]:
    """Rows of the file or its redacted copy (spec.redact); a new model's tokenizer is trained on the texts first."""
    scratch = spec.method == "scratch"
    if scratch and is_plain(path):
        text, report = read_text(path), Report()
        base = find_base(spec, folder, fresh_base(folder, spec, [text]))
        return base, encode_text(text, base.tokenizer, max_tokens=_longest(spec, base), report=report), report
    conversations, report = read(path, spec.columns)
    if spec.redact:
        redacted = write_redacted(conversations, folder)
        emit(redacted)
        conversations, report = read(folder / redacted.name)
    texts = (message.text for conversation in conversations for message in conversation.messages)
    base = find_base(spec, folder, fresh_base(folder, spec, texts) if scratch else None)
    rows = encode(
        conversations, base.tokenizer, instructions=spec.instructions, max_tokens=_longest(spec, base), report=report
    )
    return base, rows, report


def _longest(spec: Spec, base: TrainingBase) -> int:
    """Most tokens per row: the setting, or the context of the model."""
    return min(spec.hyper.max_tokens, base.context)


def histogram(lengths: Sequence[int]) -> tuple[int, ...]:
    """Counts of sorted lengths in BINS equal bins from the shortest to the longest."""
    low, width = lengths[0], (lengths[-1] - lengths[0] + 1) / BINS
    counts = Counter(int((length - low) / width) for length in lengths)
    return tuple(counts[step] for step in range(BINS))


def _check_data(path: Path, sha256: str) -> None:
    try:
        found = files.sha256(path)
    except OSError as error:
        raise JobError("training.why_no_data", f"the data set {path} cannot be read: {error}") from error
    if path.stat().st_size == 0:
        raise bad(0, "empty")
    if sha256 and found != sha256:
        detail = f"the data set {path} is {found[:12]}, but the job is for {sha256[:12]}"
        raise JobError("training.why_data_damaged", detail)
