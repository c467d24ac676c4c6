"""What people read of a data set: its rows, what is to be known of them, what a job on it would take, and the question.

Makes sentences of rows and events; changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from core.i18n.messages import Lazy, duration, money, say
from core.jobs.jobs import Job
from core.jobs.protocol import Checked, Estimated, JobEvent, LeftOut, Preview, Redacted
from core.types import Body, Button

SHOWN_LINES = 5
_SHOWN_CHARACTERS = 200
_SAMPLE, _SAMPLE_ROW = 120, 700  # characters of a row in the question, and in the preview
_BARS = "▁▂▃▄▅▆▇█"
T = TypeVar("T")


def question(job: Job, events: Sequence[JobEvent], preview: Sequence[Preview]) -> Body:
    """The report of the check, and whether to start."""
    language, checked, estimated = job.language, last(events, Checked), last(events, Estimated)
    assert checked is not None
    assert estimated is not None
    lines = rows_text(language, job.dataset, checked, "training.usable")
    lines += [f"- {line}" for line in left_out_text(language, events)]
    lines += [f"- {line}" for line in data_text(language, checked)]
    if (redacted := last(events, Redacted)) is not None and redacted.sha256 == job.dataset_sha256:
        told = {"n": redacted.replaced, "sha": redacted.sha256[:12]}
        lines.append(f"- {say(language, 'training.redacted', **told)}")
    if preview:
        lines += ["", say(language, "training.sample", line=preview[0].line), "", f"> {_sample(preview[0])}"]
    lines += [
        "",
        estimate_text(language, estimated, job.train_nano),
        "",
        say(language, "training.ask", id=job.id, label=job.label),
    ]
    return Body("\n".join(lines), _buttons(job, personal=bool(checked.personal)))


def estimate_text(language: str, estimated: Estimated, train_nano: int) -> str:
    """With `train_nano` to pay for each token."""
    to_pay = estimated.tokens * train_nano
    price = Lazy("training.price", price=money(to_pay)) if to_pay else Lazy("training.price_none")
    key = "training.estimate" if estimated.seconds else "training.estimate_unmeasured"
    return say(
        language,
        key,
        tokens=estimated.tokens,
        epochs=estimated.epochs,
        steps=estimated.steps,
        time=duration(language, estimated.seconds),
        memory=f"{estimated.memory_mib / 1024:.1f}",
        price=price,
    )


def preview_text(language: str, name: str, preview: Sequence[Preview]) -> str:
    """Each row as the model reads it, with marks around what it learns."""
    lines = [say(language, "training.preview", name=name)]
    for row in preview:
        shown = "".join(f"▶{_cut(text)}◀" if taught else _cut_head(text) for taught, text in row.parts)
        fence = "````" if "```" in shown else "```"
        lines += ["", say(language, "training.preview_line", line=row.line), fence, shown.strip("\n"), fence]
    return "\n".join(lines)


def rows_text(language: str, name: str, checked: Checked, key: str = "training.rows") -> list[str]:
    """What became of each row that was not simply used, by line."""
    lines = [say(language, key, name=name, used=checked.used, rows=checked.rows)]
    if checked.duplicates:
        where = ", ".join(str(line) for line in checked.doubled[:SHOWN_LINES])
        more = "…" if checked.duplicates > len(checked.doubled[:SHOWN_LINES]) else ""
        told = "training.doubled" if where else "training.duplicates"
        lines.append(f"- {say(language, told, n=checked.duplicates, lines=f'{where}{more}')}")
    rejected = checked.rows - checked.used - checked.duplicates  # of these only the first are named
    for named, count in ((checked.rejected, rejected), (checked.mended, len(checked.mended))):
        shown = named[:SHOWN_LINES]
        lines += [f"- {short(one)}" for one in shown]
        if count > len(shown):
            lines.append(f"- {say(language, 'training.more_lines', n=count - len(shown))}")
    return lines


def left_out_text(language: str, events: Sequence[JobEvent]) -> list[str]:
    """What could not become a row, because it cannot be read where it is stored."""
    left_out = last(events, LeftOut)
    return [say(language, "training.left_out", n=left_out.unreadable)] if left_out else []


def data_text(language: str, checked: Checked) -> list[str]:
    """What is to be known of the rows that are used, before time is spent on them."""
    lines = []
    if checked.longest_tokens:
        lines.append(
            say(
                language,
                "training.lengths",
                bars=_bars(checked.histogram),
                shortest=checked.shortest_tokens,
                median=checked.median_tokens,
                longest=checked.longest_tokens,
            )
        )
    if checked.missing:
        lines.append(say(language, "training.missing", n=checked.missing))
    if checked.personal:
        lines.append(say(language, "training.personal", found=", ".join(checked.personal)))
    return lines


def last(events: Sequence[JobEvent], kind: type[T]) -> T | None:
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


def short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def _buttons(job: Job, *, personal: bool) -> tuple[Button, ...]:
    offered = [
        ("start_anyway" if personal else "start", "start"),
        *([("redact", "redact")] if personal else []),
        ("preview", "preview"),
        ("cancel", "cancel"),
    ]
    return tuple(
        Button(say(job.language, f"training.button_{key}"), "command", f"/finetune {word} {job.id}")
        for key, word in offered
    )


def _bars(histogram: Sequence[int]) -> str:
    """One character for each count, the tallest for the largest."""
    most = max(histogram, default=0)
    return "".join(_BARS[min(len(_BARS) - 1, count * len(_BARS) // most)] if count else " " for count in histogram)


def _sample(row: Preview) -> str:
    """One line of it: what was asked, and what is learned."""
    asked, said = (" ".join(text.split()) for text in (row.asked, row.said))
    return f"{_cut(asked, _SAMPLE)} ▶ {_cut(said, _SAMPLE)}"


def _cut(text: str, most: int = _SAMPLE_ROW) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _cut_head(text: str) -> str:
    return text if len(text) <= _SAMPLE_ROW else f"…{text[-_SAMPLE_ROW:]}"
