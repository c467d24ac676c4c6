"""What /finetune does: start, status, list, cancel. Knows rows; the supervisor (core.training) does the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from core import jobtexts
from core.commands import Call
from core.datasets import check_room
from core.delivery import new_delivery
from core.errors import BadInput, UnknownThing
from core.job import PRESETS
from core.operators import Handler
from core.store import directory, jobs
from core.store.database import Tx
from core.store.jobs import Job
from core.texts import Later, duration, say
from core.types import Body, Caller, EraseFiles, Json, Outcome, WakeTraining

_LISTED = 10


def start(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Queue a job on a data set that core.datasets has brought: its sha256 is the argument, and what they call it.

    Raises BadInput where the channel has an open job already, too many wait, or the preset is none.
    """
    before = check_room(tx, caller)
    preset = call.arguments.get("preset", "").lower()
    if preset and preset not in PRESETS:
        raise BadInput("training.no_preset", typed=preset[:40], presets=", ".join(PRESETS))
    job = jobs.create(tx, caller, call.arguments["dataset"], call.arguments.get("name", ""), preset=preset)
    new_delivery(tx, job_id=job.id)
    made: Json = {"job": job.id, "dataset": job.dataset_sha256}
    directory.audit(tx, caller, " ".join(call.key).strip(), job.label, None, made)
    key = "training.queued" if before else "training.started"
    fields = {"id": job.id, "name": job.dataset, "title": job.title, "label": job.label, "before": before}
    return Outcome(Body(say(caller.language, key, **fields)), (WakeTraining(),))


def status(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises UnknownThing."""
    job = _find(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    job = replace(job, language=caller.language)
    events = jobs.events(tx, job.id)
    lines = [_line(tx, caller, job)]
    if job.state == "failed":
        lines.append(jobtexts.failed_text(job))
    elif job.state in ("running", "publishing"):
        lines.append(jobtexts.progress_text(job, events))
    elif job.state == "published":
        lines.append(jobtexts.report(job, events).text)
    return Outcome(Body("\n\n".join(lines)))


def list_jobs(tx: Tx, caller: Caller, call: Call) -> Outcome:
    found = jobs.of_channel(tx, caller.channel.id, _LISTED)
    if not found:
        return Outcome(Body(say(caller.language, "training.none")))
    head = say(caller.language, "training.list", title=caller.channel.title)
    return Outcome(Body("\n".join([head, "", *(f"- {_line(tx, caller, job)}" for job in found)])))


def cancel(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Raises UnknownThing."""
    job = _find(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    if not jobs.cancel(tx, job.id, jobs.ASKED):
        return Outcome(Body(say(caller.language, "training.ended_already", id=job.id)))
    directory.audit(tx, caller, "finetune cancel", job.label, {"job": job.id, "state": job.state}, "cancelled")
    return Outcome(
        Body(say(caller.language, jobtexts.cancelled_key(job), id=job.id, title=job.title)),
        (WakeTraining(), EraseFiles()),
    )


def resume(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Go on with a job that was cancelled, from its last checkpoint. Raises UnknownThing, BadInput."""
    job = _find(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    if not jobs.resumable(tx, job.id):
        raise BadInput("training.not_resumable", id=job.id, state=Later(f"training.state_{job.state}"))
    before = check_room(tx, caller)
    jobs.resume(tx, job.id)
    directory.audit(tx, caller, "finetune resume", job.label, {"job": job.id, "state": job.state}, "queued")
    fields = {"id": job.id, "title": job.title, "label": job.label, "before": before}
    key = "training.resumed_behind" if before else "training.resumed"
    return Outcome(Body(say(caller.language, key, **fields)), (WakeTraining(),))


HANDLERS: Mapping[tuple[str, str], Handler] = {
    ("finetune", ""): start,
    ("finetune", "start"): start,
    ("finetune", "status"): status,
    ("finetune", "list"): list_jobs,
    ("finetune", "cancel"): cancel,
    ("finetune", "resume"): resume,
}


def _find(tx: Tx, caller: Caller, call: Call) -> Job | None:
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


def _line(tx: Tx, caller: Caller, job: Job) -> str:
    return say(
        caller.language,
        "training.line",
        id=job.id,
        label=job.label,
        name=job.dataset,
        state=Later(f"training.state_{job.state}"),
        age=duration(caller.language, max(0, tx.now_ms - job.created_ms) / 1000),
    )
