"""Jobs as rows: the states of a fine-tune and the transitions between them.

validating -> waiting -> queued -> running -> publishing -> published | cancelled | failed. A validating job's data is
checked; a waiting job needs a person's confirmation.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core.delivery import deliveries
from core.jobs import datasets, event_log
from core.jobs.datasets import CONSENTED
from core.jobs.protocol import JobEvent, Shown
from core.storage import lifecycle
from core.storage.database import Row, Tx
from core.storage.home import Home
from core.storage.lifecycle import Erasure, Periods, Prune, Stage
from core.types import Address, After, Caller, Effect

UNCONFIRMED = ("validating", "waiting")
AT_WORK = ("queued", "running", "publishing")
OPEN = (*UNCONFIRMED, *AT_WORK)
REQUESTED, EXPIRED, REPLACED, ERASED = "requested", "expired", "replaced", "erased"  # reasons of a cancellation
KEPT = "kept"  # the fault of a failed job whose checkpoint is kept
_LOG_S = 30 * 86_400.0
# Ended, and can be resumed: the checkpoint is kept as long as the data set.
RESUMABLE = (
    f"(job.state = 'cancelled' AND job.reason = '{REQUESTED}' OR job.state = 'failed' AND job.reason LIKE '{KEPT}: %')"
    " AND job.imported = '' AND job.started_ms IS NOT NULL AND EXISTS (SELECT 1 FROM dataset"
    f" WHERE sha256 = job.dataset_sha256 AND erased_ms IS NULL AND source NOT IN {CONSENTED})"
)
_JOB = (
    "SELECT job.*, dataset.source, channel.title, channel.instructions, train_nano, charge.tokens_trained, gross_nano"
    " FROM job JOIN dataset ON dataset.sha256 = dataset_sha256 JOIN channel ON channel.id = job.channel_id"
    " LEFT JOIN price ON price.id = job.price_id"
    " LEFT JOIN ledger AS charge ON charge.job_id = job.id AND charge.kind = 'usage'"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One fine-tune. `title` and `instructions` are the channel's present ones."""

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
    result: str  # sha256 of the published version, or ""
    address: Address
    language: str
    attempts: int
    created_ms: int
    started: bool  # a trainer has run for it
    ended_ms: int | None
    preset: str  # of hyper-parameters; "": those of the configuration
    imported: str  # folder of an adapter from elsewhere to evaluate; "": the job trains
    columns: Mapping[str, str]
    redact: bool
    train_nano: int  # price of a trained token in nano-units; 0: free
    charged: tuple[int, int] | None  # (trained tokens, price in nano-units) of a published job

    @property
    def label(self) -> str:
        return f"{self.adapter}@{self.version}"

    @property
    def keeps_checkpoint(self) -> bool:
        """Whether it can be resumed after a cancellation: its data set and its checkpoint stay."""
        return self.started and self.source not in CONSENTED and not self.imported

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
    imported: str = "",
) -> Job:
    """Insert a job of the caller's channel, with a version that no adapter and no job of this name ever had.

    `dataset` is the person's name for the data set. `columns` maps question, answer and system to columns. `imported`:
    evaluate the adapter in this folder of jobs/ instead of training one.
    """
    name, at = caller.channel.adapter, caller.address
    used = "SELECT version FROM adapter WHERE name = ? UNION SELECT version FROM job WHERE adapter = ?"
    latest = int(tx.value(f"SELECT ifnull(max(version), 0) FROM ({used})", [name, name]))
    given = {"dataset_sha256": dataset_sha256, "dataset": dataset or dataset_sha256[:12], "preset": preset}
    address = {"platform": at.platform, "account": at.account, "place": at.place, "conversation": at.conversation}
    job_id = tx.insert(
        "job",
        **{**given, **address},
        channel_id=caller.channel.id,
        adapter=name,
        version=latest + 1,
        state=state,
        columns=json.dumps(columns, ensure_ascii=False) if columns else "",
        imported=imported,
        language=caller.language,
        actor=caller.user,
        created_ms=tx.now_ms,
    )
    return get(tx, job_id)


def find(tx: Tx, job_id: int) -> Job | None:
    return next(iter(_select(tx, "WHERE job.id = ?", job_id)), None)


def get(tx: Tx, job_id: int) -> Job:
    """A job that exists."""
    return _select(tx, "WHERE job.id = ?", job_id)[0]


def of_channel(tx: Tx, channel_id: int, limit: int) -> list[Job]:
    """The channel's jobs, newest first."""
    return _select(tx, "WHERE job.channel_id = ? ORDER BY job.id DESC LIMIT ?", channel_id, limit)


def open_jobs(tx: Tx) -> list[Job]:
    """All open jobs, oldest first."""
    return _select(tx, f"WHERE job.state IN {OPEN} ORDER BY job.id")


def due(tx: Tx) -> list[Job]:
    """Jobs for the training worker, oldest first: to train, or ended with a message that is not sent yet."""
    return _due(tx, f"job.state IN {AT_WORK}", f"job.state NOT IN {OPEN} AND started_ms IS NOT NULL")


def due_checks(tx: Tx) -> list[Job]:
    """Jobs for the check worker, oldest first: to check, or checked with a message that is not sent yet."""
    return _due(tx, "job.state = 'validating'", f"job.state NOT IN {AT_WORK} AND started_ms IS NULL")


def _due(tx: Tx, work: str, unsent: str) -> list[Job]:
    where = f"{work} OR ({unsent} AND delivery.state IN ('open', 'generated'))"
    return _select(tx, f"JOIN delivery ON delivery.job_id = job.id WHERE {where} ORDER BY job.id")


def state_of(tx: Tx, job_id: int) -> str:
    return str(tx.value("SELECT state FROM job WHERE id = ?", [job_id]))


def start(tx: Tx, job_id: int) -> bool:
    """Set a job running; False where it is not at work any more."""
    sql = f"UPDATE job SET state = 'running', started_ms = ifnull(started_ms, ?) WHERE id = ? AND state IN {AT_WORK}"
    return bool(tx.run(sql, [tx.now_ms, job_id]))


def await_confirmation(tx: Tx, job_id: int) -> bool:
    """Set a checked job waiting for a yes; False where it was cancelled meanwhile."""
    sql = "UPDATE job SET state = 'waiting', asked_ms = ? WHERE id = ? AND state = 'validating'"
    return bool(tx.run(sql, [tx.now_ms, job_id]))


def pin_price(tx: Tx, job_id: int, tokens: int | None = None) -> None:
    """Fix the price of a trained token at the channel's present one; at most `tokens`, the estimate, are charged."""
    newest = "SELECT max(id) FROM price WHERE price.channel_id = job.channel_id"
    tx.run(f"UPDATE job SET tokens_agreed = ?, price_id = ({newest}) WHERE id = ?", [tokens, job_id])


def leave_waiting(tx: Tx, job_id: int, state: str, *, redact: bool = False) -> None:
    """Queue a waiting job, or have it checked again; its next message is a new one."""
    tx.run("UPDATE job SET state = ?, redact = ?, asked_ms = NULL, attempts = 0 WHERE id = ?", [state, redact, job_id])
    deliveries.renew(tx, job_id=job_id)


def replace_dataset(tx: Tx, job_id: int, dataset_sha256: str) -> None:
    """Train on another data set, with standard column names, and erase the earlier one if nothing needs it."""
    before = str(tx.value("SELECT dataset_sha256 FROM job WHERE id = ?", [job_id]))
    tx.run("UPDATE job SET dataset_sha256 = ?, columns = '', redact = 0 WHERE id = ?", [dataset_sha256, job_id])
    datasets.erase_unneeded(tx, before)


def expired(tx: Tx, age_ms: int) -> list[int]:
    """Jobs that have waited `age_ms` or longer for a yes."""
    rows = tx.all("SELECT id FROM job WHERE state = 'waiting' AND asked_ms <= ?", [tx.now_ms - age_ms])
    return [row["id"] for row in rows]


def has_turn_since(tx: Tx, job_id: int, conversation_id: int) -> bool:
    """Whether the conversation has a turn after the question of the job."""
    sql = "SELECT 1 FROM turn WHERE conversation_id = ? AND at_ms > (SELECT asked_ms FROM job WHERE id = ?) LIMIT 1"
    return bool(tx.value(sql, [conversation_id, job_id]))


def jobs_ahead(tx: Tx, job_id: int) -> int:
    """How many jobs are trained before this queued one."""
    before = "state IN ('running', 'publishing') OR (state = 'queued' AND id < ?)"
    return int(tx.value(f"SELECT count(*) FROM job WHERE id <> ? AND ({before})", [job_id, job_id]))


def publishing(tx: Tx, job_id: int, sha256: str) -> bool:
    """Record the hash of the folder that is moved next, so that a crash after the move loses nothing."""
    if not tx.run("UPDATE job SET state = 'publishing' WHERE id = ? AND state = 'running'", [job_id]):
        return False
    event_log.append(tx, job_id, "publishing", json.dumps({"sha256": sha256}))
    return True


def end(tx: Tx, job_id: int, state: str, reason: str = "", result: str | None = None) -> bool:
    """Set a job published, cancelled or failed; False where it had ended before."""
    sql = f"UPDATE job SET state = ?, reason = ?, result = ?, ended_ms = ? WHERE id = ? AND state IN {OPEN}"
    changed = tx.run(sql, [state, reason, result, tx.now_ms, job_id])
    datasets.erase_unneeded(tx, str(tx.value("SELECT dataset_sha256 FROM job WHERE id = ?", [job_id])))
    return bool(changed)


def fail(tx: Tx, job_id: int, fault: str, reason: str, *, resumable: bool) -> bool:
    """Set a job failed; False where it had ended before. `resumable`: it has a checkpoint to continue from."""
    return end(tx, job_id, "failed", f"{KEPT if resumable and fault == 'ours' else fault}: {reason}"[:500])


def cancel(tx: Tx, job_id: int, reason: str) -> bool:
    """Cancel an open job; its worker stops the trainer. False where it had ended before.

    A job that was cancelled by a command before it started sends no message of its own: the command is answered.
    """
    was = state_of(tx, job_id)
    if not end(tx, job_id, "cancelled", reason):
        return False
    if was in (*UNCONFIRMED, "queued"):
        if reason in (REQUESTED, REPLACED):
            deliveries.skip(tx, deliveries.new_delivery(tx, job_id=job_id))
        elif was == "waiting":
            deliveries.renew(tx, job_id=job_id)
    return True


def resumable(tx: Tx, job_id: int) -> bool:
    """Whether the job has ended and can be resumed."""
    return bool(tx.value(f"SELECT 1 FROM job WHERE id = ? AND {RESUMABLE}", [job_id]))


def resume(tx: Tx, job_id: int) -> None:
    """Queue a resumable job again; its next message is a new one."""
    tx.run("UPDATE job SET state = 'queued', reason = '', ended_ms = NULL, attempts = 0 WHERE id = ?", [job_id])
    deliveries.renew(tx, job_id=job_id)


def drop_message(tx: Tx, job_id: int) -> None:
    """Give up a message that the platform does not take."""
    deliveries.give_up(tx, deliveries.new_delivery(tx, job_id=job_id))


def is_delivered(tx: Tx, job_id: int) -> bool:
    """Whether the job's message has its final form, or was given up."""
    return bool(tx.value("SELECT state IN ('done', 'failed') FROM delivery WHERE job_id = ?", [job_id]))


def count_by_state(tx: Tx) -> dict[str, int]:
    return {row["state"]: row["n"] for row in tx.all("SELECT state, count(*) AS n FROM job GROUP BY 1")}


def count_attempt(tx: Tx, job_id: int) -> int:
    """Count a trainer process that ended without result or progress; the new count."""
    return int(tx.value("UPDATE job SET attempts = attempts + 1 WHERE id = ? RETURNING attempts", [job_id]))


def keep_test_rows(tx: Tx, job_id: int, text: str) -> None:
    """Store, encrypted, the test rows that operators may see. They are erased together with their data set."""
    kept = "EXISTS (SELECT 1 FROM dataset WHERE sha256 = dataset_sha256 AND erased_ms IS NULL)"
    tx.run(f"UPDATE job SET shown = ? WHERE id = ? AND {kept}", [tx.cipher.seal(text), job_id])


def test_rows(tx: Tx, result: str) -> Shown:
    """The stored test rows of a version; empty where there are none."""
    sealed = tx.value("SELECT shown FROM job WHERE result = ? AND shown IS NOT NULL", [result])
    return Shown.load(tx.cipher.unseal(sealed) if sealed else "")


def _select(tx: Tx, tail: str, *parameters: str | int) -> list[Job]:
    return [_job(row) for row in tx.all(f"{_JOB} {tail}", parameters)]


def _job(row: Row) -> Job:
    plain = (
        "id channel_id title instructions adapter version dataset dataset_sha256 source state reason language attempts"
        " created_ms ended_ms imported preset"
    )
    return Job(
        **{name: row[name] for name in plain.split()},
        result=row["result"] or "",
        address=Address(row["platform"], row["account"], row["place"], row["conversation"]),
        started=row["started_ms"] is not None,
        columns=json.loads(row["columns"] or "{}"),
        redact=bool(row["redact"]),
        train_nano=row["train_nano"] or 0,
        charged=None if row["gross_nano"] is None else (row["tokens_trained"], row["gross_nano"]),
    )


def move_place(tx: Tx, platform: str, account: str, before: str, now: str) -> None:
    """Follow a rename of a place by its platform."""
    where = "platform = ? AND account = ? AND place = ?"
    tx.run(f"UPDATE OR IGNORE job SET place = ? WHERE {where}", [now, platform, account, before])


def add_event(tx: Tx, job_id: int, event: JobEvent) -> None:
    """Store an event of the trainer. Progress beyond the last stored step resets the count of attempts."""
    if event_log.add_event(tx, job_id, event):
        tx.run("UPDATE job SET attempts = 0 WHERE id = ?", [job_id])


# --- erasure and retention ---


@lifecycle.withdraws
def withdraw(tx: Tx, user_hash: str, channel_id: int) -> tuple[After, ...]:
    """Erase the channel's data sets with messages of a person, and cancel the jobs on them."""
    return (Effect.ERASE_FILES, Effect.WAKE_TRAINING) if _erase_datasets(tx, user_hash, channel_id) else ()


def _erase_datasets(tx: Tx, user_hash: str, channel_id: int | None = None) -> list[str]:
    erased = datasets.of_person(tx, user_hash, channel_id)
    for sha256 in erased:
        datasets.erase(tx, sha256)
        for row in tx.all("SELECT id FROM job WHERE dataset_sha256 = ? AND ended_ms IS NULL", [sha256]):
            cancel(tx, row["id"], ERASED)
    return erased


@lifecycle.erases(Stage.DATASETS)
def _erase(tx: Tx, erasure: Erasure) -> None:
    erasure.datasets = _erase_datasets(tx, erasure.user_hash)
    datasets.drop_person(tx, erasure.user_hash)


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    sent = "NOT EXISTS (SELECT 1 FROM delivery WHERE job_id = job.id AND state IN ('open', 'generated'))"
    where = f"place <> '' AND ended_ms <= ? AND {sent} AND NOT ({RESUMABLE})"
    return [lifecycle.batch("UPDATE job SET place = '', conversation = ''", where, kept.dead)]


@lifecycle.sweeps
def _sweep(tx: Tx, kept: Periods) -> Callable[[Home], None]:
    names = tx.all("SELECT id AS name FROM job UNION SELECT imported FROM job WHERE ended_ms IS NULL")
    known = {str(row["name"]) for row in names}
    gone = {str(row["id"]) for row in tx.all(f"SELECT id FROM job WHERE ended_ms IS NOT NULL AND NOT ({RESUMABLE})")}

    def remove(home: Home) -> None:
        lifecycle.remove_files(home.jobs, gone=gone, known=known)
        for path in lifecycle.entries(home.logs):
            if path.name.startswith("job-") and lifecycle.age_s(path) > _LOG_S:
                path.unlink(missing_ok=True)

    return remove
