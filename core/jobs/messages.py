"""Messages about jobs and their data sets: progress, question, report, failure."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TypeVar

from core.adapters.commands import anyway_button, compare_button, discard_button, promote_button
from core.commands.parser import as_word
from core.i18n.messages import Lazy, duration, money, say
from core.jobs.datasets import CONSENTED
from core.jobs.jobs import EXPIRED, Job
from core.jobs.protocol import (
    FEWEST_TEST_ROWS,
    MOST_FORGOTTEN,
    MOST_OF_A_SKILL,
    Answered,
    Checked,
    Done,
    Estimated,
    Evaluated,
    Failed,
    JobEvent,
    Judged,
    LeftOut,
    Planned,
    Preview,
    Progress,
    Redacted,
    Warned,
    forgets,
)
from core.types import Body, Button

T = TypeVar("T")
SHOWN_LINES = 5
_BAR_CELLS = 20
_SHOWN_CHARACTERS = 200
_SAMPLE, _SAMPLE_ROW = 120, 700  # characters of a row in the question, and in the preview
_BARS = "▁▂▃▄▅▆▇█"


def progress_text(job: Job, events: Sequence[JobEvent]) -> str:
    """The text of the progress message."""
    head = say(job.language, "training.improving", title=job.title, label=job.label)
    progress = last(events, Progress)
    if progress is None:
        checked = last(events, Checked)
        first = f"{head}\n{_phase_text(job, events)}"
        notes = [f"- {line}" for line in data_text(job.language, checked)] if checked else []
        notes += _open_warnings(events)
        return "\n".join([first, "", *notes]) if notes else first
    share = progress.step / max(progress.steps, 1)
    bar = ("▓" * round(share * _BAR_CELLS)).ljust(_BAR_CELLS, "░")
    left = duration(job.language, progress.seconds_left)
    losses = {"loss": _losses(progress), "unseen": _validation_loss(job.language, events)}
    lines = [
        say(job.language, "training.bar", bar=bar, percent=round(share * 100), left=left),
        say(job.language, "training.loss", **losses, pace=round(progress.tokens_per_s)),
        *([say(job.language, "training.comparing")] if progress.step == progress.steps else []),
    ]
    first = f"{head} · {say(job.language, 'training.round', epoch=progress.epoch, epochs=progress.epochs)}"
    hint = say(job.language, "training.stop_hint", id=job.id)
    return "\n".join([first, "", *(f"{line}  " for line in lines), *_open_warnings(events), "", hint])


def _phase_text(job: Job, events: Sequence[JobEvent]) -> str:
    planned, answered = last(events, Planned), last(events, Answered)
    name = {"name": job.dataset}
    if planned is not None:
        return say(job.language, "training.planned", **name, **asdict(planned))
    if answered is not None and answered.done < answered.of:
        return say(job.language, "training.answering", **name, **asdict(answered))
    return say(job.language, "training.loading" if last(events, Checked) else "training.checking", **name)


def ended_body(job: Job, events: Sequence[JobEvent], *, resumable: bool) -> Body:
    """The final form of the job's message."""
    if job.state == "cancelled":
        return Body(say(job.language, cancelled_key(job), **_named(job)))
    if job.state == "failed":
        return Body(failed_text(job, resumable=resumable))
    return report(job, events)


def report(job: Job, events: Sequence[JobEvent], *, judged: Judged | None = None, now: Lazy | None = None) -> Body:
    """`judged`: the stored verdict where the events are deleted. `now`: the version's present state, if it has one."""
    language, judged = job.language, last(events, Judged) or judged
    done, checked = last(events, Done), last(events, Checked)
    lines = verdict_text(language, job.label, judged) if judged else [say(language, "training.ready", label=job.label)]
    if done is not None and not done.steps:
        lines.append(say(language, "import.trained_elsewhere"))
    elif done is not None:
        lines.append(say(language, "training.took", time=duration(language, done.seconds), steps=done.steps))
    if job.charged and job.charged[1]:
        tokens, nano = job.charged
        lines.append(say(language, "training.charged", tokens=tokens, price=money(nano)))
    if checked is not None:
        lines += rows_text(language, job.dataset, checked)
        lines += [f"- {line}" for line in (*left_out_text(language, events), *data_text(language, checked))]
    lines += [f"- {short(event.text)}" for event in events if isinstance(event, Warned)]
    passed = judged is None or judged.passed
    hint = "training.promote_hint" if passed else "training.promote_anyway_hint"
    key = "training.version_now" if now else hint
    lines += ["", say(language, key, label=job.label, title=job.title, state=now)]
    look = worst_button if judged is not None and not passed and judged.worst else compare_button
    buttons = (look, promote_button if passed else anyway_button, discard_button)
    return Body("\n".join(lines), tuple(button(language, job.label) for button in buttons))


def verdict_text(language: str, label: str, judged: Judged) -> list[str]:
    """The gate's verdict and its numbers; ability and generated answers where they were measured."""
    fields = {"label": label, "champion": judged.champion, "rows": judged.rows, "fewest": FEWEST_TEST_ROWS}
    losses = {"before": f"{judged.loss_champion:.2f}", "after": f"{judged.loss:.2f}", "better": judged.better}
    bounds = {"low": f"{judged.low:+.2f}", "high": f"{judged.high:+.2f}"}
    lines = [
        say(language, f"training.verdict_{judged.verdict}", **fields),
        say(language, "training.judged", **fields, **losses, **bounds),
        say(language, "training.lift", lift=f"{judged.lift:.2f}", before=f"{judged.lift_champion:.2f}", **fields),
    ]
    if judged.ability is None:
        return lines
    change = {"change": judged.ability, "high": judged.ability_high, "worst": judged.skill_change}
    numbers = {**change, "limit": MOST_FORGOTTEN, "most": MOST_OF_A_SKILL}
    shown = {name: f"{number:+.2f}" for name, number in numbers.items()}
    skill = Lazy(f"training.skill_{judged.skill}") if judged.skill else ""
    able = "training.unable" if forgets(judged.ability_high, judged.skill_change) else "training.able"
    lines.append(say(language, able, **shown, skill=skill))
    if asked := judged.asked:
        sound = {"sound": asked - judged.unsound, "base": asked - judged.unsound_base}
        lines.append(say(language, "training.sound", **sound, asked=asked))
    return lines


def failed_text(job: Job, *, resumable: bool) -> str:
    """Whose fault the failure is, the reason, and what to do."""
    fault, _, reason = job.reason.partition(": ")
    yours = "training.failed_examples" if job.source in CONSENTED else "training.failed_yours"
    settings = "training.failed_adapter" if job.imported else "training.failed_settings"
    ours = "training.failed_ours_adapter" if job.imported else "training.failed_ours"
    key = "training.failed_kept" if resumable else {"yours": yours, "settings": settings}.get(fault, ours)
    return say(job.language, key, **_named(job), reason=short(reason))


def _named(job: Job) -> dict[str, object]:
    """Fields for sentences; `typed` is the data set's name as a command takes it."""
    return {"title": job.title, "id": job.id, "name": job.dataset, "typed": as_word(job.dataset)}


def worst_button(language: str, label: str) -> Button:
    return Button(say(language, "adapter.worst_button"), "command", f"/adapter worst {label}")


def cancelled_key(job: Job) -> str:
    known = {"erased": "training.cancelled_erased", EXPIRED: "training.expired"}
    if job.reason in known:
        return known[job.reason]
    return "training.cancelled" if job.keeps_checkpoint else "training.cancelled_for_good"


def _open_warnings(events: Sequence[JobEvent]) -> list[str]:
    """Warnings since the last progress."""
    further = max((at for at, event in enumerate(events) if isinstance(event, Progress)), default=-1)
    return [f"- {short(event.text)}" for event in events[further + 1 :] if isinstance(event, Warned)]


def _losses(now: Progress) -> str:
    first, last = f"{now.first_loss:.2f}", f"{now.loss:.2f}"
    return last if not now.first_loss or first == last else f"{first} → {last}"


def _validation_loss(language: str, events: Sequence[JobEvent]) -> str:
    losses = [event.loss for event in events if isinstance(event, Evaluated) and event.split == "validation"]
    return say(language, "training.unseen", loss=f"{losses[-1]:.2f}") if losses else ""


def question(job: Job, events: Sequence[JobEvent], preview: Sequence[Preview]) -> Body:
    """The report of the check and the question whether to start."""
    language, checked, estimated = job.language, last(events, Checked), last(events, Estimated)
    assert checked is not None
    assert estimated is not None
    lines = rows_text(language, job.dataset, checked, "training.usable")
    lines += [f"- {line}" for line in (*left_out_text(language, events), *data_text(language, checked))]
    if (redacted := last(events, Redacted)) is not None and redacted.sha256 == job.dataset_sha256:
        fields = {"n": redacted.replaced, "sha": redacted.sha256[:12]}
        lines.append(f"- {say(language, 'training.redacted', **fields)}")
    if preview:
        lines += ["", say(language, "training.sample", line=preview[0].line), "", f"> {_sample(preview[0])}"]
    ask = say(language, "training.ask", id=job.id, label=job.label)
    lines += ["", estimate_text(language, estimated, job.train_nano), "", ask]
    return Body("\n".join(lines), _buttons(job, personal=bool(checked.personal)))


def estimate_text(language: str, estimated: Estimated, train_nano: int) -> str:
    """Time, memory and price. `train_nano`: price of a token in nano-units."""
    to_pay = estimated.tokens * train_nano
    price = Lazy("training.price", price=money(to_pay)) if to_pay else Lazy("training.price_none")
    key = "training.estimate" if estimated.seconds else "training.estimate_unmeasured"
    fields = {"time": duration(language, estimated.seconds), "memory": f"{estimated.memory_mib / 1024:.1f}"}
    return say(language, key, **asdict(estimated), **fields, price=price)


def preview_text(language: str, name: str, preview: Sequence[Preview]) -> str:
    """Each row as the model reads it, with marks around the learned parts."""
    lines = [say(language, "training.preview", name=name)]
    for row in preview:
        shown = "".join(f"▶{_cut(text)}◀" if taught else _cut_head(text) for taught, text in row.parts)
        fence = "````" if "```" in shown else "```"
        lines += ["", say(language, "training.preview_line", line=row.line), fence, shown.strip("\n"), fence]
    return "\n".join(lines)


def rows_text(language: str, name: str, checked: Checked, key: str = "training.rows") -> list[str]:
    """Counts of rows, and the lines that were rejected, mended or duplicates."""
    lines = [say(language, key, name=name, used=checked.used, rows=checked.rows)]
    if checked.duplicates:
        where = ", ".join(map(str, checked.doubled[:SHOWN_LINES]))
        more = "…" if checked.duplicates > len(checked.doubled[:SHOWN_LINES]) else ""
        key = "training.doubled" if where else "training.duplicates"
        lines.append(f"- {say(language, key, n=checked.duplicates, lines=f'{where}{more}')}")
    rejected = checked.rows - checked.used - checked.duplicates  # only the first are listed
    for found, count in ((checked.rejected, rejected), (checked.mended, len(checked.mended))):
        shown = found[:SHOWN_LINES]
        lines += [f"- {short(line)}" for line in shown]
        if count > len(shown):
            lines.append(f"- {say(language, 'training.more_lines', n=count - len(shown))}")
    return lines


def left_out_text(language: str, events: Sequence[JobEvent]) -> list[str]:
    """The count of stored texts that could not be decrypted."""
    left_out = last(events, LeftOut)
    return [say(language, "training.left_out", n=left_out.unreadable)] if left_out else []


def data_text(language: str, checked: Checked) -> list[str]:
    """Lengths of rows, missing rows, personal data."""
    lines = []
    if longest := checked.longest_tokens:
        fields = {"shortest": checked.shortest_tokens, "median": checked.median_tokens, "longest": longest}
        lines.append(say(language, "training.lengths", bars=_bars(checked.histogram), **fields))
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
    offered = ["start_anyway", "redact", "preview", "cancel"] if personal else ["start", "preview", "cancel"]
    texts = [(say(job.language, f"training.button_{key}"), key.removesuffix("_anyway")) for key in offered]
    return tuple(Button(text, "command", f"/finetune {word} {job.id}") for text, word in texts)


def _bars(histogram: Sequence[int]) -> str:
    most = max(histogram, default=0)
    return "".join(_BARS[min(len(_BARS) - 1, count * len(_BARS) // most)] if count else " " for count in histogram)


def _sample(row: Preview) -> str:
    """Question and answer of a row on one line."""
    return " ▶ ".join(_cut(" ".join(text.split()), _SAMPLE) for text in (row.question, row.answer))


def _cut(text: str, most: int = _SAMPLE_ROW) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _cut_head(text: str) -> str:
    return text if len(text) <= _SAMPLE_ROW else f"…{text[-_SAMPLE_ROW:]}"


def failure_reason(failed: Failed, language: str) -> str:
    """The trainer's reason with the line of the data set, unless the reason names the line."""
    prefix = say(language, "data.line", line=failed.line, reason="").strip()
    if not failed.line or prefix in failed.reason:
        return failed.reason
    return say(language, "data.line", line=failed.line, reason=failed.reason)
