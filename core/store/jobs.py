"""Jobs, their events and the data sets they read, as rows. Knows no process, no file and no sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass

from core.job import Checked, Done, Failed, JobEvent, Planned, Progress, Shown, dump_event, load_event
from core.store.database import Row, Tx
from core.types import Address, Caller

OPEN = ("queued", "running", "publishing")
ASKED = "asked"  # the reason of a cancellation by an operator
CONVERSATIONS = "conversations"  # the source of a data set that is made of what people said
MAX_EVENTS = 200
_OPEN = "('queued', 'running', 'publishing')"
_JOB = (
    "SELECT job.*, dataset.source, channel.title, channel.instructions"
    " FROM job JOIN dataset ON dataset.sha256 = dataset_sha256 JOIN channel ON channel.id = channel_id"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One fine-tune. `title` and `instructions` are its channel's, as they are now."""

    id: int
    channel_id: int
    title: str
    instructions: str
    adapter: str
    version: int
    dataset: str
    dataset_sha256: str
    source: str
    state: str
    reason: str
    address: Address
    language: str
    attempts: int
    created_ms: int
    ended_ms: int | None
    preset: str  # of hyper-parameters; "" is the configuration's
    imported: str  # the folder of an adapter from elsewhere that it examines; "" where it trains

    @property
    def label(self) -> str:
        return f"{self.adapter}@{self.version}"

    @property
    def lasting(self) -> bool:
        """Whether it may go on after it was cancelled: its data set, and what was learned, outlive it."""
        return self.source != CONVERSATIONS and not self.imported

    @property
    def open(self) -> bool:
        return self.state in OPEN


def create(tx: Tx, caller: Caller, dataset_sha256: str, dataset: str = "", *, preset: str = "") -> Job:
    """A queued job for the caller's channel; its version is one that no adapter and no job of that name ever had.

    `dataset` is what these people call the data set: others may have brought the same bytes under another name.
    """
    name = caller.channel.adapter
    version = 1 + int(
        tx.value(
            "SELECT max(ifnull((SELECT max(version) FROM adapter WHERE name = ?), 0),"
            " ifnull((SELECT max(version) FROM job WHERE adapter = ?), 0))",
            [name, name],
        )
    )
    at = caller.address
    job_id = tx.insert(
        "job",
        channel_id=caller.channel.id,
        adapter=name,
        version=version,
        dataset_sha256=dataset_sha256,
        dataset=dataset or dataset_sha256[:12],
        state="queued",
        preset=preset,
        platform=at.platform,
        account=at.account,
        place=at.place,
        conversation=at.conversation,
        language=caller.language,
        actor=caller.user,
        created_ms=tx.now_ms,
    )
    made = find(tx, job_id)
    assert made is not None
    return made


def find(tx: Tx, job_id: int) -> Job | None:
    row = tx.one(f"{_JOB} WHERE job.id = ?", [job_id])
    return _job(row) if row else None


def of_channel(tx: Tx, channel_id: int, limit: int) -> list[Job]:
    """Newest first."""
    return [
        _job(row) for row in tx.all(f"{_JOB} WHERE channel_id = ? ORDER BY job.id DESC LIMIT ?", [channel_id, limit])
    ]


def open_jobs(tx: Tx) -> list[Job]:
    """Oldest first."""
    return [_job(row) for row in tx.all(f"{_JOB} WHERE job.state IN {_OPEN} ORDER BY job.id")]


def due(tx: Tx) -> list[Job]:
    """What the supervisor has to do, oldest first: jobs that are open, and ended ones whose message is not written."""
    return [
        _job(row)
        for row in tx.all(
            f"{_JOB} JOIN delivery ON delivery.job_id = job.id"
            f" WHERE job.state IN {_OPEN} OR delivery.state IN ('open', 'generated') ORDER BY job.id"
        )
    ]


def state_of(tx: Tx, job_id: int) -> str:
    return str(tx.value("SELECT state FROM job WHERE id = ?", [job_id]))


def start(tx: Tx, job_id: int) -> bool:
    """Mark it as running; whether it still is to be run."""
    return bool(
        tx.run(
            f"UPDATE job SET state = 'running', started_ms = ifnull(started_ms, ?) WHERE id = ? AND state IN {_OPEN}",
            [tx.now_ms, job_id],
        )
    )


def publishing(tx: Tx, job_id: int, sha256: str) -> bool:
    """Note which folder is about to be moved, so that a crash between the move and the commit loses nothing."""
    if not tx.run("UPDATE job SET state = 'publishing' WHERE id = ? AND state = 'running'", [job_id]):
        return False
    _insert_event(tx, job_id, "publishing", json.dumps({"sha256": sha256}))
    return True


def published_folder(tx: Tx, job_id: int) -> str:
    """The hash that `publishing` noted, or ""."""
    data = tx.value(
        "SELECT data FROM job_event WHERE job_id = ? AND kind = 'publishing' ORDER BY seq DESC LIMIT 1", [job_id]
    )
    return str(json.loads(data)["sha256"]) if data else ""


def unpublished_folder(tx: Tx, job_id: int) -> str:
    """The same where no version came of it, so that nobody will ever use the folder."""
    sha256 = published_folder(tx, job_id)
    return "" if tx.value("SELECT 1 FROM adapter WHERE sha256 = ?", [sha256]) else sha256


def end(tx: Tx, job_id: int, state: str, reason: str = "", result: str | None = None) -> bool:
    """Published, cancelled or failed; whether it was open until now.

    What people said is needed by its job alone: that data set is erased with it. Whose it was stays written down.
    """
    changed = tx.run(
        f"UPDATE job SET state = ?, reason = ?, result = ?, ended_ms = ? WHERE id = ? AND state IN {_OPEN}",
        [state, reason, result, tx.now_ms, job_id],
    )
    tx.run(
        "UPDATE dataset SET erased_ms = ? WHERE erased_ms IS NULL AND source = ?"
        " AND sha256 = (SELECT dataset_sha256 FROM job WHERE id = ?)"
        f" AND NOT EXISTS (SELECT 1 FROM job WHERE dataset_sha256 = dataset.sha256 AND state IN {_OPEN})",
        [tx.now_ms, CONVERSATIONS, job_id],
    )
    return bool(changed)


def cancel(tx: Tx, job_id: int, reason: str) -> bool:
    """End it unpublished; the supervisor stops its trainer. Whether it was open.

    Of one that was asked for before it began, the answer to that says enough: it gets no message of its own.
    """
    queued = state_of(tx, job_id) == "queued"
    if not end(tx, job_id, "cancelled", reason):
        return False
    if queued and reason == ASKED:
        tx.run("UPDATE delivery SET state = 'done' WHERE job_id = ?", [job_id])
    return True


def resumable(tx: Tx, job_id: int) -> bool:
    """Whether it was cancelled by somebody and may go on: what it has learned so far is kept as long as its data."""
    return bool(
        tx.value(
            "SELECT 1 FROM job JOIN dataset ON sha256 = dataset_sha256 WHERE job.id = ? AND state = 'cancelled'"
            " AND reason = ? AND erased_ms IS NULL AND imported = ''",
            [job_id, ASKED],
        )
    )


def resume(tx: Tx, job_id: int) -> None:
    """Queue a resumable job again. What was said of its end stays as it is; what it says next is another message."""
    tx.run("UPDATE job SET state = 'queued', reason = '', ended_ms = NULL, attempts = 0 WHERE id = ?", [job_id])
    tx.run("DELETE FROM part WHERE delivery_id IN (SELECT id FROM delivery WHERE job_id = ?)", [job_id])
    tx.run("DELETE FROM delivery WHERE job_id = ?", [job_id])
    tx.insert("delivery", job_id=job_id, state="open")


def give_up_message(tx: Tx, job_id: int) -> None:
    """The platform does not take what is said of this job; /finetune status still tells it."""
    tx.run("UPDATE delivery SET state = 'failed', body = NULL WHERE job_id = ?", [job_id])


def is_told(tx: Tx, job_id: int) -> bool:
    """Whether the job's message has its last form, or will get none."""
    return bool(tx.value("SELECT state IN ('done', 'failed') FROM delivery WHERE job_id = ?", [job_id]))


def count_attempt(tx: Tx, job_id: int) -> int:
    """One more trainer that ended without a result or progress; how many by now."""
    return int(tx.value("UPDATE job SET attempts = attempts + 1 WHERE id = ? RETURNING attempts", [job_id]))


def add_event(tx: Tx, job_id: int, event: JobEvent) -> None:
    """Keep what the trainer said: each thing once, of its progress the first and the newest, never more than a bound.

    A step that it had not come to before means that it is alive and well.
    """
    data = dump_event(event)
    of_kind = "FROM job_event WHERE job_id = ? AND kind = ?"
    if isinstance(event, Progress):
        last = newest_progress(tx, job_id)
        if last is None or event.step > last.step:
            tx.run("UPDATE job SET attempts = 0 WHERE id = ?", [job_id])
        tx.run(f"DELETE {of_kind} AND seq > (SELECT min(seq) {of_kind})", [job_id, event.kind, job_id, event.kind])
    elif isinstance(event, Checked | Planned | Done | Failed):
        tx.run(f"DELETE {of_kind}", [job_id, event.kind])
    elif tx.value(
        f"SELECT count(*) >= ? OR ifnull(max(data = ?), 0) {of_kind}", [MAX_EVENTS, data, job_id, event.kind]
    ):
        return
    _insert_event(tx, job_id, event.kind, data)


def events(tx: Tx, job_id: int) -> list[JobEvent]:
    """In the order in which the trainer said them."""
    rows = tx.all("SELECT data FROM job_event WHERE job_id = ? AND kind <> 'publishing' ORDER BY seq", [job_id])
    return [load_event(row["data"]) for row in rows]


def newest_progress(tx: Tx, job_id: int) -> Progress | None:
    data = tx.value(
        "SELECT data FROM job_event WHERE job_id = ? AND kind = 'progress' ORDER BY seq DESC LIMIT 1", [job_id]
    )
    event = load_event(data) if data else None
    return event if isinstance(event, Progress) else None


# --- data sets ---


def keep_dataset(tx: Tx, sha256: str, name: str, *, source: str, size_bytes: int, brought_by: str) -> None:
    """Write a data set down. The same bytes brought again are there again; whose they were first, they stay."""
    tx.run(
        "INSERT INTO dataset (sha256, name, source, size_bytes, brought_by, created_ms) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET created_ms = excluded.created_ms, erased_ms = NULL",
        [sha256, name, source, size_bytes, brought_by, tx.now_ms],
    )


def known_dataset(tx: Tx, user_hash: str, typed: str) -> tuple[str, str] | None:
    """(sha256, name) of a data set by its name or the beginning of its hash: one that this person may know of.

    That is what they brought themselves, and what jobs of the channels that they operate have read; never what people
    said, because they consented for one channel.
    """
    row = tx.one(
        "SELECT known.sha256, known.name FROM dataset JOIN ("
        " SELECT sha256, name, created_ms AS at_ms FROM dataset WHERE brought_by = ?"
        " UNION ALL SELECT dataset_sha256, job.dataset, job.created_ms FROM job JOIN operator ON user_hash = ?"
        " AND (operator.channel_id IS NULL OR operator.channel_id = job.channel_id)"
        ") AS known ON known.sha256 = dataset.sha256 WHERE erased_ms IS NULL AND source <> ?"
        " AND (known.name = ? OR (length(?) >= 8 AND substr(known.sha256, 1, length(?)) = ?))"
        " ORDER BY at_ms DESC LIMIT 1",
        [user_hash, user_hash, CONVERSATIONS, typed, typed, typed, typed.lower()],
    )
    return (row["sha256"], row["name"]) if row else None


def is_erased(tx: Tx, sha256: str) -> bool:
    """Whether it was erased, or never was."""
    return not tx.value("SELECT 1 FROM dataset WHERE sha256 = ? AND erased_ms IS NULL", [sha256])


def set_imported(tx: Tx, job_id: int, unpacked: str) -> None:
    """The job examines an adapter from elsewhere: the folder of that name beside the jobs' becomes its candidate."""
    tx.run("UPDATE job SET imported = ? WHERE id = ?", [unpacked, job_id])


def keep_shown(tx: Tx, job_id: int, text: str) -> None:
    """What of its test rows may be shown, sealed; nothing of a data set that is erased. Erasing one erases this too."""
    tx.run(
        "UPDATE job SET shown = ? WHERE id = ?"
        " AND EXISTS (SELECT 1 FROM dataset WHERE sha256 = dataset_sha256 AND erased_ms IS NULL)",
        [tx.cipher.seal(text), job_id],
    )


def shown(tx: Tx, result: str) -> Shown:
    """Of the job that made this version; empty where nothing is kept, or not any more."""
    sealed = tx.value("SELECT shown FROM job WHERE result = ? AND shown IS NOT NULL", [result])
    return Shown.load(tx.cipher.unseal(sealed) if sealed else "")


def _insert_event(tx: Tx, job_id: int, kind: str, data: str) -> None:
    seq = int(tx.value("SELECT ifnull(max(seq), 0) + 1 FROM job_event WHERE job_id = ?", [job_id]))
    tx.insert("job_event", job_id=job_id, seq=seq, at_ms=tx.now_ms, kind=kind, data=data)


def _job(row: Row) -> Job:
    return Job(
        id=row["id"],
        channel_id=row["channel_id"],
        title=row["title"],
        instructions=row["instructions"],
        adapter=row["adapter"],
        version=row["version"],
        dataset=row["dataset"],
        dataset_sha256=row["dataset_sha256"],
        source=row["source"],
        state=row["state"],
        reason=row["reason"],
        address=Address(row["platform"], row["account"], row["place"], row["conversation"]),
        language=row["language"],
        attempts=row["attempts"],
        created_ms=row["created_ms"],
        ended_ms=row["ended_ms"],
        imported=row["imported"],
        preset=row["preset"],
    )
