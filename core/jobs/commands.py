"""/finetune and /adapter worst: handlers on job rows. core.jobs.checks and core.jobs.supervisor do the work."""

import asyncio
from dataclasses import dataclass, replace

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
from core.jobs import datasets, event_log, jobs, messages
from core.jobs.checks import read_preview
from core.jobs.datasets import CONSENTED
from core.jobs.examples import store_examples
from core.jobs.jobs import Job
from core.jobs.protocol import Checked, LeftOut, Preview, Spec, load_judged
from core.storage.database import Row, Tx
from core.types import Body, Caller, Effect, Grant, Json, Outcome

MAX_OPEN = 8  # jobs at work, all channels together
COLUMNS = ("question", "answer", "system")  # of a data set, where the person names them
_MAX_LICENCE, _MAX_COLUMN = 100, 200
_LISTED = 10


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A stored data set. `agreed`: train without asking. `unreadable`: stored texts that cannot be decrypted."""

    sha256: str
    name: str
    agreed: bool
    unreadable: int = 0


async def prepare_data(context: CommandContext, caller: Caller, call: Call) -> PreparedData:
    """Store the data set of `/finetune`: a named or uploaded file, or the channel's consented examples.

    Raises BadInput for a data set that is missing, unreadable or too large, AppError for a full disk.
    """
    given = call.arguments
    typed, agreed = given.get("source", given.get("dataset", "")), given.get("go") == "yes"
    if caller.attachments and typed == "yes":  # the caption of an uploaded file
        typed, agreed = "", True
    for key, limit in (*((column, _MAX_COLUMN) for column in COLUMNS), ("licence", _MAX_LICENCE)):
        if len(given.get(key, "")) > limit:
            raise BadInput("training.setting_too_long", setting=key, limit=limit)
    if bool(given.get("question")) != bool(given.get("answer")):
        raise BadInput("training.both_columns")
    try:
        if typed in CONSENTED and not caller.attachments:
            sha256, unreadable = await store_examples(context, caller, typed)
            return PreparedData(sha256, typed, agreed, unreadable)
        sha256, name = await datasets.store_named(context, caller, typed, licence=given.get("licence", ""))
        return PreparedData(sha256, name, agreed)
    except OSError as error:  # of the home folder; errors of the given file are BadInput
        raise datasets.storage_error(error) from error


def check_room(tx: Tx, caller: Caller) -> None:
    """Raises BadInput where the channel has a job at work, or MAX_OPEN jobs are. Jobs that wait for a yes are not."""
    at_work = [job for job in jobs.open_jobs(tx) if job.state != "waiting"]
    for job in at_work:
        if job.channel_id == caller.channel.id and job.state != "validating":
            raise BadInput("training.busy", title=job.title, id=job.id)
    if len(at_work) >= MAX_OPEN:
        raise BadInput("training.too_many", n=len(at_work))


async def read_rows(context: CommandContext, caller: Caller, call: Call) -> tuple[Preview, ...]:
    """The sample rows of the job's check; none once the job has started or ended."""
    job = await context.database.read(lambda tx: find_job(tx, caller, call))
    return await asyncio.to_thread(read_preview, context.home, job.id) if job else ()


async def read_base(context: CommandContext, caller: Caller, call: Call) -> str:
    """The fingerprint of the base model that the job was trained on; "" where it has no folder."""
    job = await context.database.read(lambda tx: find_job(tx, caller, call))
    spec = await asyncio.to_thread(Spec.find, context.home.jobs / str(job.id)) if job else None
    return spec.fingerprint if spec else ""


@command("finetune", prepare=prepare_data, check=check_room)
@command("finetune", "from", prepare=prepare_data, check=check_room)
def begin(tx: Tx, caller: Caller, call: Call, data: PreparedData) -> Outcome:
    """Create a job: its data set is checked, then it waits for a yes; with `yes` it is trained at once.

    It replaces jobs of the channel that were not confirmed. Raises BadInput for an unknown preset.
    """
    preset = call.arguments.get("preset", "").lower()
    if preset and preset not in PRESETS:
        raise BadInput("training.no_preset", typed=preset[:40], presets=", ".join(PRESETS))
    unanswered = [job.id for job in jobs.open_jobs(tx) if job.channel_id == caller.channel.id]
    given, agreed = call.arguments, data.agreed
    columns = {key: given[key] for key in COLUMNS if given.get(key)}
    state = "queued" if agreed else "validating"
    job = jobs.create(tx, caller, data.sha256, data.name, state=state, columns=columns, preset=preset)
    for old in unanswered:  # after the new job exists, which keeps a data set of both
        jobs.cancel(tx, old, jobs.REPLACED)
    if agreed:
        jobs.pin_price(tx, job.id)
    new_delivery(tx, job_id=job.id)
    if data.unreadable:
        event_log.add_event(tx, job.id, LeftOut(data.unreadable))
    made: Json = {"job": job.id, "dataset": job.dataset_sha256, "state": job.state}
    audit.record(tx, caller, call.action, job.label, None, made)
    text = _queued(tx, caller, job) if agreed else say(caller.language, "training.validating", name=job.dataset)
    left_out = [f"- {line}" for line in messages.left_out_text(caller.language, event_log.events(tx, job.id))]
    return Outcome(Body("\n".join([text, *left_out])), (Effect.WAKE_TRAINING,))


@command("finetune", "start")
def start(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Confirm a job. Raises UnknownThing, and BadInput for a job that does not wait."""
    job = _waiting_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    jobs.leave_waiting(tx, job.id, "queued")
    audit.record(tx, caller, "finetune start", job.label, {"job": job.id, "state": job.state}, "queued")
    return Outcome(Body(_queued(tx, caller, job)), (Effect.WAKE_TRAINING,))


@command("finetune", "redact")
def redact(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Check the job again on a data set without personal data. Raises UnknownThing, BadInput."""
    job = _waiting_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    checked = messages.last(event_log.events(tx, job.id), Checked)
    if checked is None or not checked.personal:
        raise BadInput("training.nothing_personal", name=job.dataset)
    jobs.leave_waiting(tx, job.id, "validating", redact=True)
    audit.record(tx, caller, "finetune redact", job.label, {"dataset": job.dataset_sha256}, "validating")
    return Outcome(Body(say(caller.language, "training.redacting", name=job.dataset)), (Effect.WAKE_TRAINING,))


@command("finetune", "preview", prepare=read_rows)
def preview(tx: Tx, caller: Caller, call: Call, rows: tuple[Preview, ...]) -> Outcome:
    """Sample rows of the check, until the job starts or ends. Raises UnknownThing."""
    job = find_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    if not rows:
        return Outcome(Body(say(caller.language, "training.no_preview", id=job.id)))
    return Outcome(Body(messages.preview_text(caller.language, job.dataset, rows)))


@command("finetune", "status", prepare=read_rows)
def status(tx: Tx, caller: Caller, call: Call, rows: tuple[Preview, ...]) -> Outcome:
    job = find_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    job = replace(job, language=caller.language)
    events = event_log.events(tx, job.id)
    line = _line(tx, caller, job)
    if job.state == "waiting" and not jobs.is_delivered(tx, job.id):  # the question is not sent yet
        return Outcome(Body(say(caller.language, "training.still_checking", name=job.dataset)))
    if job.state == "waiting":
        question = messages.question(job, events, rows)
        return Outcome(replace(question, text=f"{line}\n\n{question.text}"))
    if job.state == "failed":
        line += f"\n\n{messages.failed_text(job, resumable=jobs.resumable(tx, job.id))}"
    elif job.state in ("running", "publishing"):
        line += f"\n\n{messages.progress_text(job, events)}"
    elif job.state == "published":
        version = registry.by_sha(tx, job.result)
        report = messages.report(job, events, judged=load_judged(version.judged), now=state_now(tx, version))
        line += f"\n\n{report.text}"
    return Outcome(Body(line))


@command("finetune", "list")
def list_jobs(tx: Tx, caller: Caller, call: Call) -> Outcome:
    found = jobs.of_channel(tx, caller.channel.id, _LISTED)
    if not found:
        return Outcome(Body(say(caller.language, "training.none")))
    head = say(caller.language, "training.list", title=caller.channel.title)
    return Outcome(Body("\n- ".join([f"{head}\n", *(_line(tx, caller, job) for job in found)])))


@command("finetune", "data")
def list_data(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Data sets that the person may know."""
    found = datasets.known_datasets(tx, caller.user, _LISTED)
    if not found:
        return Outcome(Body(say(caller.language, "training.no_data")))
    lines = [say(caller.language, "training.data") + "\n", *(_data_line(tx, caller, one) for one in found)]
    return Outcome(Body("\n- ".join(lines)))


@command("finetune", "cancel")
def cancel(tx: Tx, caller: Caller, call: Call) -> Outcome:
    job = find_job(tx, caller, call)
    if job is None:
        return Outcome(Body(say(caller.language, "training.none")))
    if not jobs.cancel(tx, job.id, jobs.REQUESTED):
        return Outcome(Body(say(caller.language, "training.ended_already", id=job.id)))
    audit.record(tx, caller, "finetune cancel", job.label, {"job": job.id, "state": job.state}, "cancelled")
    text = say(caller.language, messages.cancelled_key(job), id=job.id, title=job.title)
    return Outcome(Body(text), (Effect.WAKE_TRAINING, Effect.ERASE_FILES))


@command("finetune", "resume", prepare=read_base)
def resume(tx: Tx, caller: Caller, call: Call, trained_on: str) -> Outcome:
    """Continue an ended job from its checkpoint; on another base model it starts again from nothing.

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
    if trained_on and registry.loaded_base(tx) not in (None, trained_on):
        text = f"{_queued(tx, caller, job)} {say(caller.language, 'training.begins_anew')}"
        return Outcome(Body(text), (Effect.WAKE_TRAINING,))
    return Outcome(
        Body(_queued(tx, caller, job, "training.resumed", "training.resumed_behind")), (Effect.WAKE_TRAINING,)
    )


@command("adapter", "worst")
def worst(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """The test rows with the largest rise in loss, where faults of the data show first. Raises BadInput."""
    version = find_version(tx, caller, call.arguments["version"])
    judged = version.judged if version else {}
    if version is None or not judged:
        raise BadInput("adapter.no_rows", label=version.label if version else BASE)
    rows = judged.get("worst") or []
    fields = {"label": version.label, "champion": judged.get("champion", "?"), "n": len(rows)}
    if not rows:
        return Outcome(Body(say(caller.language, "adapter.none_worse", **fields)))
    lines = [say(caller.language, "adapter.worst", **fields), ""]
    texts = {line: (question, answer) for line, _, _, question, answer in jobs.test_rows(tx, version.sha256).worst}
    for line, before, after in rows:
        asked, said = texts.get(line, ("", ""))
        key = "adapter.worst_row" if asked else "adapter.worst_line"
        fields = {"line": line, "before": f"{before:.2f}", "after": f"{after:.2f}", "asked": asked, "said": said}
        lines.append(say(caller.language, key, **fields))
    if not texts:
        lines += ["", say(caller.language, "adapter.rows_gone")]
    return Outcome(Body("\n".join(lines)))


def answer_to_question(tx: Tx, caller: Caller, text: str) -> Call | None:
    """The command for a plain "yes" or "no" directly after a job's question, or None.

    None for a person without the grant, and in public places: the word may be meant for somebody else there.
    """
    word = text.strip().strip(".!。！").lower()
    if caller.public or len(word) > 12 or caller.grant < Grant.OPERATOR:
        return None
    here = (job for job in jobs.open_jobs(tx) if job.channel_id == caller.channel.id and job.state == "waiting")
    job = next(here, None)
    if job is None or not jobs.is_delivered(tx, job.id) or jobs.has_turn_since(tx, job.id, caller.conversation_id):
        return None
    if replace(caller.address, conversation="", reply_to="") != replace(job.address, conversation=""):
        return None  # threads may differ: a direct message may start one
    for key, action in (("training.words_yes", "start"), ("training.words_no", "cancel")):
        if any(word in say(language, key).split() for language in languages()):
            return parse(f"/finetune {action} {job.id}")
    return None


def find_job(tx: Tx, caller: Caller, call: Call) -> Job | None:
    """The named job of the channel, or its newest; None where it has none. Raises UnknownThing."""
    typed = call.arguments.get("job", "")
    if not typed:
        return next(iter(jobs.of_channel(tx, caller.channel.id, 1)), None)
    job = jobs.find(tx, int(typed)) if typed.isdecimal() and len(typed) < 16 else None
    if job is None or job.channel_id != caller.channel.id:
        raise UnknownThing("training.no_job", typed=typed[:40])
    return job


def _waiting_job(tx: Tx, caller: Caller, call: Call) -> Job | None:
    """A job that waits for a yes and whose question is sent. Raises UnknownThing, BadInput."""
    job = find_job(tx, caller, call)
    if job is None:
        return None
    if job.state == "validating" or (job.state == "waiting" and not jobs.is_delivered(tx, job.id)):
        raise BadInput("training.still_checking", name=job.dataset)
    if job.state != "waiting":
        raise BadInput("training.not_waiting", id=job.id, state=Lazy(f"training.state_{job.state}"))
    return job


def _queued(tx: Tx, caller: Caller, job: Job, first: str = "training.started", behind: str = "training.queued") -> str:
    before = jobs.jobs_ahead(tx, job.id)
    fields = {"id": job.id, "name": job.dataset, "title": job.title, "label": job.label, "before": before}
    return say(caller.language, behind if before else first, **fields)


def _line(tx: Tx, caller: Caller, job: Job) -> str:
    state = Lazy(f"training.state_{job.state}")
    if job.state == "queued" and (before := jobs.jobs_ahead(tx, job.id)):
        state = Lazy("training.state_queued_behind", before=before)
    fields = {"id": job.id, "label": job.label, "name": job.dataset, "state": state}
    return say(caller.language, "training.line", **fields, age=_age(tx, caller, job.created_ms))


def _data_line(tx: Tx, caller: Caller, data: Row) -> str:
    fields = {"name": data["called"], "sha": data["sha256"][:12], "rows": data["rows"] or "?"}
    return say(
        caller.language,
        "training.data_line",
        **fields,
        size=f"{max(1, round(data['size_bytes'] / 1000))} kB",
        origin=Lazy("training.data_redacted", parent=data["parent"][:12])
        if data["parent"]
        else Lazy("training.data_file"),
        who=Lazy("training.data_you")
        if data["brought_by"] == caller.user
        else operators.label_of(tx, data["brought_by"]),
        licence=data["licence"] or Lazy("training.data_no_licence"),
        age=_age(tx, caller, data["created_ms"]),
    )


def _age(tx: Tx, caller: Caller, at_ms: int) -> str:
    return duration(caller.language, max(0, tx.now_ms - at_ms) / 1000)
