"""The events of a job as rows, bounded in number, and the `publishing` entry."""

import json

from core.jobs.protocol import JobEvent, Newest, Progress, dump_event, load_event
from core.storage import lifecycle
from core.storage.database import Tx
from core.storage.lifecycle import Periods, Prune

MAX_EVENTS = 200
CURVE_POINTS = 100  # of progress from the first step to the last, for the loss curve


def add_event(tx: Tx, job_id: int, event: JobEvent) -> bool:
    """Store an event: the newest of most kinds, all of a few kinds up to MAX_EVENTS, and of progress a curve.

    True for progress beyond the last stored step.
    """
    data, forward = dump_event(event), False
    of_kind = "FROM job_event WHERE job_id = ? AND kind = ?"
    full = f"SELECT count(*) >= ? OR ifnull(max(data = ?), 0) {of_kind}"
    if isinstance(event, Progress):
        rows = tx.all(f"SELECT seq, data {of_kind} ORDER BY seq DESC LIMIT 2", [job_id, event.kind])
        at = [json.loads(row["data"])["step"] for row in rows]
        forward = not at or event.step > at[0]
        if len(at) == 2 and at[0] - at[1] < max(1, event.steps / CURVE_POINTS):  # too near, or training went back
            tx.run("DELETE FROM job_event WHERE job_id = ? AND seq = ?", [job_id, rows[0]["seq"]])
    elif isinstance(event, Newest):
        tx.run(f"DELETE {of_kind}", [job_id, event.kind])
    elif tx.value(full, [MAX_EVENTS, data, job_id, event.kind]):
        return False
    append(tx, job_id, event.kind, data)
    return forward


def events(tx: Tx, job_id: int) -> list[JobEvent]:
    """In the order of their arrival."""
    rows = tx.all("SELECT data FROM job_event WHERE job_id = ? AND kind <> 'publishing' ORDER BY seq", [job_id])
    return [load_event(row["data"]) for row in rows]


def clear(tx: Tx, job_id: int) -> None:
    """Forget what a training from another base model reported."""
    tx.run("DELETE FROM job_event WHERE job_id = ? AND kind NOT IN ('publishing', 'left_out')", [job_id])


def append(tx: Tx, job_id: int, kind: str, data: str) -> None:
    seq = int(tx.value("SELECT ifnull(max(seq), 0) + 1 FROM job_event WHERE job_id = ?", [job_id]))
    tx.insert("job_event", job_id=job_id, seq=seq, at_ms=tx.now_ms, kind=kind, data=data)


def published_folder(tx: Tx, job_id: int) -> str:
    """The hash of the folder that a `publishing` entry names, or ""."""
    sql = "SELECT data FROM job_event WHERE job_id = ? AND kind = 'publishing' ORDER BY seq DESC LIMIT 1"
    data = tx.value(sql, [job_id])
    return str(json.loads(data)["sha256"]) if data else ""


def unpublished_folder(tx: Tx, job_id: int) -> str:
    """The same hash where no version was registered for it, so that the folder can be removed."""
    sha256 = published_folder(tx, job_id)
    return "" if tx.value("SELECT 1 FROM adapter WHERE sha256 = ?", [sha256]) else sha256


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    ended = "job_id IN (SELECT id FROM job WHERE ended_ms <= ?)"
    return [lifecycle.batch("DELETE FROM job_event", ended, kept.dataset, key="job_id")]
