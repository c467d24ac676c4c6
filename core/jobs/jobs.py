"""Jobs, as rows. Knows no process, no file and no sentence.

validating -> waiting -> queued -> running -> publishing -> published | cancelled | failed. The check of the data is
validating; waiting is for somebody's yes, without which nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core.delivery import deliveries
from core.jobs import datasets, event_log
from core.jobs.datasets import CONVERSATIONS, FEEDBACK, OF_PEOPLE
from core.jobs.protocol import JobEvent, Shown
from core.storage import lifecycle
from core.storage.database import Row, Tx
from core.storage.home import Home
from core.storage.lifecycle import Erasure, Periods, Prune, Stage
from core.types import Address, After, Caller, EraseFiles, WakeTraining

BEFORE = ("validating", "waiting")  # nobody has agreed to it yet
AT_WORK = ("queued", "running", "publishing")
OPEN = (*BEFORE, *AT_WORK)
ASKED, EXPIRED, REPLACED = "asked", "expired", "replaced"  # why a job was cancelled
ERASED = "erased"  # the same, where the data set was erased
_LOG_S = 30 * 86_400.0
KEPT = "kept"  # the fault of a job that failed on our side, where what it had learned is kept
_OPEN = "('validating', 'waiting', 'queued', 'running', 'publishing')"
_AT_WORK = "('queued', 'running', 'publishing')"
# Ended, and may go on: what it has learned so far is kept as long as its data set.
RESUMABLE = (
    f"(job.state = 'cancelled' AND job.reason = '{ASKED}' OR job.state = 'failed' AND job.reason LIKE '{KEPT}: %')"
    " AND job.imported = '' AND job.started_ms IS NOT NULL AND EXISTS (SELECT 1 FROM dataset"
    f" WHERE sha256 = job.dataset_sha256 AND erased_ms IS NULL AND source NOT IN ('{CONVERSATIONS}', '{FEEDBACK}'))"
)
_JOB = (
    "SELECT job.*, dataset.source, channel.title, channel.instructions, train_nano, charge.tokens_trained, gross_nano"
    " FROM job JOIN dataset ON dataset.sha256 = dataset_sha256 JOIN channel ON channel.id = job.channel_id"
    " LEFT JOIN price ON price.id = job.price_id"
    " LEFT JOIN ledger AS charge ON charge.job_id = job.id AND charge.kind = 'usage'"
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
    result: str  # the sha256 of the version that came of it; "" where none did
    address: Address
    language: str
    attempts: int
    created_ms: int
    started: bool  # whether it ever was trained
    ended_ms: int | None
    preset: str  # of hyper-parameters; "" is the configuration's
    imported: str  # the folder of an adapter from elsewhere that it examines; "" where it trains
    columns: Mapping[str, str]
    redact: bool
    train_nano: int  # the price of a token that was offered, or agreed to; 0 where there is none
    charged: tuple[int, int] | None  # (tokens that were trained, their price in nano-units), once it is published

    @property
    def label(self) -> str:
        return f"{self.adapter}@{self.version}"

    @property
    def lasting(self) -> bool:
        """Whether it may go on after it has ended: its data set, and what was learned, outlive it."""
        return self.started and self.source not in OF_PEOPLE and not self.imported

    @property
    def open(self) -> bool:
        return self.state in OPEN


def create(
    tx: Tx,
    caller: Caller,
    dataset_sha256: str,
    dataset: str = "",
    *,
    state: str = "queued",
    columns: Mapping[str, str] | None = None,
    preset: str = "",
) -> Job:
    """A job for the caller's channel; its version is one that no adapter and no job of that name ever had.

    `dataset` is what these people call the data set: others may have brought the same bytes under another name.
    `columns` are those of a question and its answer, where they were named.
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
        state=state,
        columns=json.dumps(columns, ensure_ascii=False) if columns else "",
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
        _job(row)
        for row in tx.all(f"{_JOB} WHERE job.channel_id = ? ORDER BY job.id DESC LIMIT ?", [channel_id, limit])
    ]


def open_jobs(tx: Tx) -> list[Job]:
    """Oldest first."""
    return [_job(row) for row in tx.all(f"{_JOB} WHERE job.state IN {_OPEN} ORDER BY job.id")]


def due(tx: Tx) -> list[Job]:
    """What is to be trained, oldest first, and what was trained and ended, where its message is not written."""
    return _due(tx, f"job.state IN {_AT_WORK}", f"job.state NOT IN {_OPEN} AND started_ms IS NOT NULL")


def due_checks(tx: Tx) -> list[Job]:
    """What is to be checked, oldest first, and what was checked, where its question or its end is not written."""
    return _due(tx, "job.state = 'validating'", f"job.state NOT IN {_AT_WORK} AND started_ms IS NULL")


def _due(tx: Tx, work: str, untold: str) -> list[Job]:
    return [
        _job(row)
        for row in tx.all(
            f"{_JOB} JOIN delivery ON delivery.job_id = job.id"
            f" WHERE {work} OR ({untold} AND delivery.state IN ('open', 'generated')) ORDER BY job.id"
        )
    ]


def state_of(tx: Tx, job_id: int) -> str:
    return str(tx.value("SELECT state FROM job WHERE id = ?", [job_id]))


def start(tx: Tx, job_id: int) -> bool:
    """Mark it as running; whether it still is to be run."""
    return bool(
        tx.run(
            "UPDATE job SET state = 'running', started_ms = ifnull(started_ms, ?)"
            f" WHERE id = ? AND state IN {_AT_WORK}",
            [tx.now_ms, job_id],
        )
    )


def ask(tx: Tx, job_id: int) -> bool:
    """Its data is checked: from now on it waits for a yes. Whether it still is to be asked for."""
    return bool(
        tx.run(
            "UPDATE job SET state = 'waiting', asked_ms = ? WHERE id = ? AND state = 'validating'",
            [tx.now_ms, job_id],
        )
    )


def pin_price(tx: Tx, job_id: int, tokens: int | None = None) -> None:
    """What its channel pays for a trained token now is what this job costs, whatever becomes of the price.

    `tokens` is how many were told to whoever decides: no more are charged.
    """
    tx.run(
        "UPDATE job SET tokens_agreed = ?,"
        " price_id = (SELECT max(id) FROM price WHERE price.channel_id = job.channel_id) WHERE id = ?",
        [tokens, job_id],
    )


def is_asking(tx: Tx, job_id: int) -> bool:
    return state_of(tx, job_id) == "waiting"


def move(tx: Tx, job_id: int, state: str, *, redact: bool = False) -> None:
    """Out of waiting: to be trained, or to be checked again. What it says next is another message."""
    tx.run("UPDATE job SET state = ?, redact = ?, asked_ms = NULL, attempts = 0 WHERE id = ?", [state, redact, job_id])
    deliveries.renew_for_job(tx, job_id)


def read_from(tx: Tx, job_id: int, dataset_sha256: str) -> None:
    """The job is for this data set from now on, whose columns have our own names; it needs the other one no more."""
    before = str(tx.value("SELECT dataset_sha256 FROM job WHERE id = ?", [job_id]))
    tx.run("UPDATE job SET dataset_sha256 = ?, columns = '', redact = 0 WHERE id = ?", [dataset_sha256, job_id])
    datasets.erase_unneeded(tx, before)


def expired(tx: Tx, age_ms: int) -> list[int]:
    """The jobs that have waited so long for a yes."""
    rows = tx.all("SELECT id FROM job WHERE state = 'waiting' AND asked_ms <= ?", [tx.now_ms - age_ms])
    return [row["id"] for row in rows]


def talked_since(tx: Tx, job_id: int, conversation_id: int) -> bool:
    """Whether something was said in that conversation after the job had asked."""
    return bool(
        tx.value(
            "SELECT 1 FROM turn WHERE conversation_id = ? AND at_ms > (SELECT asked_ms FROM job WHERE id = ?) LIMIT 1",
            [conversation_id, job_id],
        )
    )


def before(tx: Tx, job_id: int) -> int:
    """How many jobs are trained before this one, which waits: the one at work, and older ones that wait."""
    return int(
        tx.value(
            "SELECT count(*) FROM job WHERE id <> ?"
            " AND (state IN ('running', 'publishing') OR (state = 'queued' AND id < ?))",
            [job_id, job_id],
        )
    )


def publishing(tx: Tx, job_id: int, sha256: str) -> bool:
    """Note which folder is about to be moved, so that a crash between the move and the commit loses nothing."""
    if not tx.run("UPDATE job SET state = 'publishing' WHERE id = ? AND state = 'running'", [job_id]):
        return False
    event_log.note(tx, job_id, "publishing", json.dumps({"sha256": sha256}))
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
    """Published, cancelled or failed; whether it was open until now."""
    changed = tx.run(
        f"UPDATE job SET state = ?, reason = ?, result = ?, ended_ms = ? WHERE id = ? AND state IN {_OPEN}",
        [state, reason, result, tx.now_ms, job_id],
    )
    datasets.erase_unneeded(tx, str(tx.value("SELECT dataset_sha256 FROM job WHERE id = ?", [job_id])))
    return bool(changed)


def fail(tx: Tx, job_id: int, fault: str, reason: str, *, learned: bool) -> bool:
    """End it as failed; whether it was open. `learned`: there is something that it may go on from."""
    return end(tx, job_id, "failed", f"{KEPT if learned and fault == 'ours' else fault}: {reason}"[:500])


def cancel(tx: Tx, job_id: int, reason: str) -> bool:
    """End it unpublished; the supervisor stops its trainer. Whether it was open.

    Of one that was asked for before it began, the answer to that says enough: it gets no message of its own.
    """
    was = state_of(tx, job_id)
    if not end(tx, job_id, "cancelled", reason):
        return False
    if was in (*BEFORE, "queued"):
        if reason in (ASKED, REPLACED):
            deliveries.skip(tx, deliveries.new_delivery(tx, job_id=job_id))
        elif was == "waiting":
            deliveries.renew_for_job(tx, job_id)
    return True


def resumable(tx: Tx, job_id: int) -> bool:
    """Whether it was cancelled by somebody, or failed on our side with something learned, and may go on."""
    return bool(tx.value(f"SELECT 1 FROM job WHERE id = ? AND {RESUMABLE}", [job_id]))


def resume(tx: Tx, job_id: int) -> None:
    """Queue a resumable job again. What was said of its end stays as it is; what it says next is another message."""
    tx.run("UPDATE job SET state = 'queued', reason = '', ended_ms = NULL, attempts = 0 WHERE id = ?", [job_id])
    deliveries.renew_for_job(tx, job_id)


def give_up_message(tx: Tx, job_id: int) -> None:
    """The platform does not take what is said of this job; /finetune status still tells it."""
    deliveries.give_up(tx, deliveries.new_delivery(tx, job_id=job_id))


def is_told(tx: Tx, job_id: int) -> bool:
    """Whether the job's message has its last form, or will get none."""
    return bool(tx.value("SELECT state IN ('done', 'failed') FROM delivery WHERE job_id = ?", [job_id]))


def count_by_state(tx: Tx) -> dict[str, int]:
    return {row["state"]: row["n"] for row in tx.all("SELECT state, count(*) AS n FROM job GROUP BY 1")}


def count_attempt(tx: Tx, job_id: int) -> int:
    """One more trainer that ended without a result or progress; how many by now."""
    return int(tx.value("UPDATE job SET attempts = attempts + 1 WHERE id = ? RETURNING attempts", [job_id]))


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
        result=row["result"] or "",
        address=Address(row["platform"], row["account"], row["place"], row["conversation"]),
        language=row["language"],
        attempts=row["attempts"],
        created_ms=row["created_ms"],
        started=row["started_ms"] is not None,
        ended_ms=row["ended_ms"],
        imported=row["imported"],
        preset=row["preset"],
        columns=json.loads(row["columns"] or "{}"),
        redact=bool(row["redact"]),
        train_nano=row["train_nano"] or 0,
        charged=None if row["gross_nano"] is None else (row["tokens_trained"], row["gross_nano"]),
    )


def move_place(tx: Tx, platform: str, account: str, before: str, now: str) -> None:
    """Rename a place that the platform has renamed."""
    tx.run(
        "UPDATE OR IGNORE job SET place = ? WHERE platform = ? AND account = ? AND place = ?",
        [now, platform, account, before],
    )


def add_event(tx: Tx, job_id: int, event: JobEvent) -> None:
    """Store what the trainer reported. A step beyond the last one resets the count of failed attempts."""
    if event_log.add_event(tx, job_id, event):
        tx.run("UPDATE job SET attempts = 0 WHERE id = ?", [job_id])


# --- erasure and retention ---


def withdraw(tx: Tx, user_hash: str, channel_id: int) -> tuple[After, ...]:
    """Erase the data sets of this channel that hold messages of a person, and cancel the jobs that read them."""
    erased = _erase_datasets(tx, datasets.of_person(tx, user_hash, channel_id))
    return (EraseFiles(), WakeTraining()) if erased else ()


lifecycle.withdraws(withdraw)


def _erase_datasets(tx: Tx, erased: list[str]) -> bool:
    for sha256 in erased:
        datasets.erase(tx, sha256)
        for row in tx.all("SELECT id FROM job WHERE dataset_sha256 = ? AND ended_ms IS NULL", [sha256]):
            cancel(tx, row["id"], ERASED)
    return bool(erased)


@lifecycle.erases(Stage.DATASETS)
def _erase(tx: Tx, erasure: Erasure) -> None:
    erasure.datasets = datasets.of_person(tx, erasure.user_hash)
    _erase_datasets(tx, erasure.datasets)
    datasets.drop_person(tx, erasure.user_hash)


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    told = "NOT EXISTS (SELECT 1 FROM delivery WHERE job_id = job.id AND state IN ('open', 'generated'))"
    where = f"place <> '' AND ended_ms <= ? AND {told} AND NOT ({RESUMABLE})"
    return [lifecycle.batch("UPDATE job SET place = '', conversation = ''", "job", "id", where, kept.dead)]


@lifecycle.sweeps
def _sweep(tx: Tx, kept: Periods) -> Callable[[Home], None]:
    known = {
        str(row["name"])
        for row in tx.all("SELECT id AS name FROM job UNION SELECT imported FROM job WHERE ended_ms IS NULL")
    }
    gone = {str(row["id"]) for row in tx.all(f"SELECT id FROM job WHERE ended_ms IS NOT NULL AND NOT ({RESUMABLE})")}

    def remove(home: Home) -> None:
        lifecycle.remove_files(home.jobs, gone=gone, known=known)
        for path in lifecycle.entries(home.logs):
            if path.name.startswith("job-") and lifecycle.age_s(path) > _LOG_S:
                path.unlink(missing_ok=True)

    return remove
