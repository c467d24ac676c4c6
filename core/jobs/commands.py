"""What /finetune does: check, ask, start, status, list, cancel. Knows rows; core.jobs.worker do the work."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from core.adapters import registry
from core.adapters.commands import find_version, state_now
from core.channels import audit, operators
from core.channels.adapter_names import BASE
from core.commands.parser import parse
from core.commands.registry import CommandContext, command
from core.commands.table import Call
from core.config.sections import PRESETS
from core.delivery.deliveries import new_delivery
from core.errors import BadInput, UnknownThing
from core.i18n.messages import Lazy, duration, languages, say
from core.jobs import data_messages, datasets, event_log, job_messages, jobs
from core.jobs.checks import read_preview
from core.jobs.dataset_files import COLUMNS, BroughtData, bring_data, check_room
from core.jobs.jobs import Job
from core.jobs.protocol import Checked, LeftOut, Preview, load_judged
from core.jobs.resumable import begun_with
from core.storage.database import Tx
from core.types import Body, Caller, EraseFiles, Grant, Json, Outcome, WakeTraining

_LISTED = 10


async def read_rows(context: CommandContext, caller: Caller, call: Call) -> tuple[Preview, ...]:
    """The rows that the check chose to show; none where they are gone, as with a job that has ended."""
    job = await context.database.read(lambda tx: find_job(tx, caller, call))
    return Preview.load(await asyncio.to_thread(read_preview, context.home, job.id)) if job else ()


async def read_base(context: CommandContext, caller: Caller, call: Call) -> str:
    """The fingerprint of the base model that the job was started on; "" where it has learned nothing."""
    job = await context.database.read(lambda tx: find_job(tx, caller, call))
    begun = await asyncio.to_thread(begun_with, context.home.jobs / str(job.id)) if job else None
    return begun.fingerprint if begun else ""


@command("finetune", prepare=bring_data, check=check_room)
@command("finetune", "from", prepare=bring_data, check=check_room)
def begin(tx: Tx, caller: Caller, call: Call, data: BroughtData) -> Outcome:
    """Create a job for a data set: it is checked, then it asks; with `yes` it trains at once.

    Raises BadInput for an unknown preset.
    """
    preset = call.arguments.get("preset", "").lower()
    if preset and preset not in PRESETS:
        raise BadInput("training.no_preset", typed=preset[:40], presets=", ".join(PRESETS))
    unanswered = [job.id for job in jobs.open_jobs(tx) if job.channel_id == caller.channel.id]
    given, agreed = call.arguments, data.agreed
    columns = {key: given[key] for key in COLUMNS if given.get(key)}
    job = jobs.create(
        tx,
        caller,
        data.sha256,
        data.name,
        state="queued" if agreed else "validating",
        columns=columns,
        preset=preset,
    )
    for old in unanswered:  # this one takes its place; it is there by now, so that a data set of both is kept
        jobs.cancel(tx, old, jobs.REPLACED)
    if agreed:
        jobs.pin_price(tx, job.id)
    new_delivery(tx, job_id=job.id)
    if data.unreadable:
        event_log.add_event(tx, job.id, LeftOut(data.unreadable))
    made: Json = {"job": job.id, "dataset": job.dataset_sha256, "state": job.state}
    audit.record(tx, caller, call.action, job.label, None, made)
    text = _queued(tx, caller, job) if agreed else say(caller.language, "training.validating", name=job.dataset)
    left_out = [f"- {line}" for line in data_messages.left_out_text(caller.language, event_log.events(tx, job.id))]
    return Outcome(Body("\n".join([text, *left_out])), (WakeTraining(),))


@command("finetune", "start")
def start(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Somebody's yes. Raises UnknownThing, and BadInput for a job that does not wait for one."""
    job = _asking(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    jobs.move(tx, job.id, "queued")
    audit.record(tx, caller, "finetune start", job.label, {"job": job.id, "state": job.state}, "queued")
    return Outcome(Body(_queued(tx, caller, job)), (WakeTraining(),))


@command("finetune", "redact")
def redact(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The same job on another data set, without the personal data that was found. Raises UnknownThing, BadInput."""
    job = _asking(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    checked = data_messages.last(event_log.events(tx, job.id), Checked)
    if checked is None or not checked.personal:
        raise BadInput("training.nothing_personal", name=job.dataset)
    jobs.move(tx, job.id, "validating", redact=True)
    audit.record(tx, caller, "finetune redact", job.label, {"dataset": job.dataset_sha256}, "validating")
    return Outcome(Body(say(caller.language, "training.redacting", name=job.dataset)), (WakeTraining(),))


@command("finetune", "preview", prepare=read_rows)
def preview(tx: Tx, caller: Caller, call: Call, rows: tuple[Preview, ...]) -> Outcome:
    """The rows that the check has read; a job that has been started or has ended has none. Raises UnknownThing."""
    job = find_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    if not rows:
        return Outcome(Body(say(caller.language, "training.no_preview", id=job.id)))
    return Outcome(Body(data_messages.preview_text(caller.language, job.dataset, rows)))


@command("finetune", "status", prepare=read_rows)
def status(tx: Tx, caller: Caller, call: Call, rows: tuple[Preview, ...]) -> Outcome:
    """Raises UnknownThing."""
    job = find_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    job = replace(job, language=caller.language)
    events = event_log.events(tx, job.id)
    line = _line(tx, caller, job)
    if job.state == "waiting" and not jobs.is_told(tx, job.id):  # nothing can be started before its question stands
        return Outcome(Body(say(caller.language, "training.still_checking", name=job.dataset)))
    if job.state == "waiting":
        asked = data_messages.question(job, events, rows)
        return Outcome(replace(asked, text=f"{line}\n\n{asked.text}"))
    lines = [line]
    if job.state == "failed":
        lines.append(job_messages.failed_text(job, resumable=jobs.resumable(tx, job.id)))
    elif job.state in ("running", "publishing"):
        lines.append(job_messages.progress_text(job, events))
    elif job.state == "published":
        version = registry.by_sha(tx, job.result)
        judged = load_judged(version.manifest.get("judged") or {})
        lines.append(job_messages.report(job, events, judged=judged, now=state_now(tx, version)).text)
    return Outcome(Body("\n\n".join(lines)))


@command("finetune", "list")
def list_jobs(tx: Tx, caller: Caller, call: Call) -> Outcome:
    found = jobs.of_channel(tx, caller.channel.id, _LISTED)
    if not found:
        return Outcome(Body(say(caller.language, "training.none")))
    head = say(caller.language, "training.list", title=caller.channel.title)
    return Outcome(Body("\n".join([head, "", *(f"- {_line(tx, caller, job)}" for job in found)])))


@command("finetune", "data")
def list_data(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The data sets that this person may know of, each a version that never changes."""
    found = datasets.known_datasets(tx, caller.user, _LISTED)
    if not found:
        return Outcome(Body(say(caller.language, "training.no_data")))
    head = say(caller.language, "training.data")
    return Outcome(Body("\n".join([head, "", *(f"- {_data_line(tx, caller, one)}" for one in found)])))


@command("finetune", "cancel")
def cancel(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises UnknownThing."""
    job = find_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    if not jobs.cancel(tx, job.id, jobs.ASKED):
        return Outcome(Body(say(caller.language, "training.ended_already", id=job.id)))
    audit.record(tx, caller, "finetune cancel", job.label, {"job": job.id, "state": job.state}, "cancelled")
    return Outcome(
        Body(say(caller.language, job_messages.cancelled_key(job), id=job.id, title=job.title)),
        (WakeTraining(), EraseFiles()),
    )


@command("finetune", "resume", prepare=read_base)
def resume(tx: Tx, caller: Caller, call: Call, begun_on: str) -> Outcome:
    """Go on with a job that has ended, from its last checkpoint; on another base model it begins anew.

    Raises UnknownThing, BadInput.
    """
    job = find_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    if not jobs.resumable(tx, job.id):
        raise BadInput("training.not_resumable", id=job.id, state=Lazy(f"training.state_{job.state}"))
    check_room(tx, caller)
    jobs.resume(tx, job.id)
    audit.record(tx, caller, "finetune resume", job.label, {"job": job.id, "state": job.state}, "queued")
    if begun_on and registry.loaded_base(tx) not in (None, begun_on):
        text = f"{_queued(tx, caller, job)} {say(caller.language, 'training.begins_anew')}"
        return Outcome(Body(text), (WakeTraining(),))
    before = jobs.before(tx, job.id)
    fields = {"id": job.id, "title": job.title, "label": job.label, "before": before}
    key = "training.resumed_behind" if before else "training.resumed"
    return Outcome(Body(say(caller.language, key, **fields)), (WakeTraining(),))


@command("adapter", "worst")
def worst(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The unseen rows on which a version lost most: where to look for what is wrong with the data. Raises BadInput."""
    version = find_version(tx, caller, call.arguments["version"])
    judged = version.judged if version else {}
    if version is None or not judged:
        raise BadInput("adapter.no_rows", label=version.label if version else BASE)
    rows = judged.get("worst") or []
    fields = {"label": version.label, "champion": judged.get("champion", "?"), "n": len(rows)}
    if not rows:
        return Outcome(Body(say(caller.language, "adapter.none_worse", **fields)))
    lines = [say(caller.language, "adapter.worst", **fields), ""]
    texts = {line: (asked, said) for line, _, _, asked, said in jobs.shown(tx, version.sha256).worst}
    for line, before, after in rows:
        asked, said = texts.get(line, ("", ""))
        key = "adapter.worst_row" if asked else "adapter.worst_line"
        fields = {"line": line, "before": f"{before:.2f}", "after": f"{after:.2f}", "asked": asked, "said": said}
        lines.append(say(caller.language, key, **fields))
    if not texts:
        lines += ["", say(caller.language, "adapter.rows_gone")]
    return Outcome(Body("\n".join(lines)))


def answer_to_question(tx: Tx, caller: Caller, text: str) -> Call | None:
    """The command that a plain "yes" or "no" stands for, where a job's question is the last thing that was said here.

    Anything else is a message like any other: a word from somebody who may not, and where others read along any word,
    since it may be meant for them, and a bot may want more of who gives a command there (Telegram: an administrator).
    """
    word = text.strip().strip(".!。！").lower()
    if caller.public or len(word) > 12 or operators.grant_of(tx, caller.user, caller.channel.id) < Grant.OPERATOR:
        return None
    job = next(
        (job for job in jobs.open_jobs(tx) if job.channel_id == caller.channel.id and job.state == "waiting"), None
    )
    if job is None or not jobs.is_told(tx, job.id) or not _is_here(caller, job):
        return None
    if jobs.talked_since(tx, job.id, caller.conversation_id):
        return None
    if any(word in _words(language, "yes") for language in languages()):
        return parse(f"/finetune start {job.id}")
    if any(word in _words(language, "no") for language in languages()):
        return parse(f"/finetune cancel {job.id}")
    return None


def find_job(tx: Tx, caller: Caller, call: Call) -> Job | None:
    """The job that was named, or the channel's newest; None where it has none. Raises UnknownThing.

    A job of another channel is as unknown as one that never was.
    """
    typed = call.arguments.get("job", "")
    if not typed:
        return next(iter(jobs.of_channel(tx, caller.channel.id, 1)), None)
    job = jobs.find(tx, int(typed)) if typed.isdecimal() and len(typed) < 16 else None
    if job is None or job.channel_id != caller.channel.id:
        raise UnknownThing("training.no_job", typed=typed[:40])
    return job


def _asking(tx: Tx, caller: Caller, call: Call) -> Job | None:
    """The job, where its question is written and waits for an answer. Raises UnknownThing, BadInput."""
    job = find_job(tx, caller, call)
    if job is None:
        return None
    if job.state == "validating" or (job.state == "waiting" and not jobs.is_told(tx, job.id)):
        raise BadInput("training.still_checking", name=job.dataset)
    if job.state != "waiting":
        raise BadInput("training.not_waiting", id=job.id, state=Lazy(f"training.state_{job.state}"))
    return job


def _is_here(caller: Caller, job: Job) -> bool:
    """The same chat; in which thread does not matter, since a direct message in Slack begins one of its own."""
    at, asked = caller.address, job.address
    return (at.platform, at.account, at.place) == (asked.platform, asked.account, asked.place)


def _words(language: str, key: str) -> list[str]:
    return say(language, f"training.words_{key}").split()


def _queued(tx: Tx, caller: Caller, job: Job) -> str:
    before = jobs.before(tx, job.id)
    key = "training.queued" if before else "training.started"
    return say(caller.language, key, id=job.id, name=job.dataset, title=job.title, label=job.label, before=before)


def _line(tx: Tx, caller: Caller, job: Job) -> str:
    state = Lazy(f"training.state_{job.state}")
    if job.state == "queued" and (before := jobs.before(tx, job.id)):
        state = Lazy("training.state_queued_behind", before=before)
    return say(
        caller.language,
        "training.line",
        id=job.id,
        label=job.label,
        name=job.dataset,
        state=state,
        age=duration(caller.language, max(0, tx.now_ms - job.created_ms) / 1000),
    )


def _data_line(tx: Tx, caller: Caller, data: datasets.Dataset) -> str:
    return say(
        caller.language,
        "training.data_line",
        name=data.name,
        sha=data.sha256[:12],
        rows=data.rows or "?",
        size=f"{max(1, round(data.size_bytes / 1000))} kB",
        origin=Lazy("training.data_redacted", parent=data.parent[:12]) if data.parent else Lazy("training.data_file"),
        who=Lazy("training.data_you") if data.brought_by == caller.user else operators.label_of(tx, data.brought_by),
        licence=data.licence or Lazy("training.data_no_licence"),
        age=duration(caller.language, max(0, tx.now_ms - data.created_ms) / 1000),
    )
