"""The inbox: accepted updates as rows, their states, and which of them to handle next.

new -> running -> generated (its text is stored) -> done (answered or refused) or dead (given up).

After a crash, the rows that the engine was generating are suspects, and so is a row that was open and taken in
MAX_CRASHES crashes. Suspects are taken one at a time and run alone (core.chat.admission.Isolation); a crash meanwhile
is a strike, and MAX_STRIKES in a row end it: where the process is killed from outside, it dies beside other rows too.
A clean stop makes no suspect.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from core.commands.parser import is_command, lane_of, read
from core.commands.table import Call
from core.errors import BadCommand, Overloaded, StoredUnreadable
from core.storage import lifecycle
from core.storage.database import Row, Tx, Value
from core.storage.lifecycle import HOUR_MS, Erasure, Periods, Prune, Stage
from core.types import Address, Attachment, Incoming, Kind, Lane

MAX_OPEN = 10_000  # turns of an account; stops and buttons always get through
MAX_OPEN_PERSON = 200  # of these, of one person; and so many stops and buttons
_NOTICE_MS = 60_000  # a person reads about one limit once in so long
MAX_TEXT = 100_000  # characters; a longer text is not stored, and refused with its length
MAX_CRASHES, MAX_STRIKES = 3, 8
OPEN = "('new', 'running', 'generated')"
_UNANSWERED = ("refused", "failed", "limited", "refused_quietly", "unconfirmed")  # outcomes that /retry takes up
_MOST_GIVEN_UP = 1000
_LOOKED_BACK = 20  # rows before a /retry
_HERE = "platform = ? AND account = ? AND place = ? AND conversation = ?"
# Candidates: control rows, and the oldest open turn of each conversation. Within an account, channels take turns, rows
# that have begun before new ones. The channel of a place is found as in core.channels.bindings.
_DUE = f"""
    WITH head AS (
        SELECT id, lane, state, platform, account, coalesce(
            (SELECT channel_id FROM binding WHERE platform = this.platform AND account = this.account
                AND place = this.place),
            (SELECT channel_id FROM person WHERE user_hash = this.user_hash),
            (SELECT channel_id FROM binding WHERE platform = this.platform AND account = this.account AND place = '')
        ) AS channel FROM inbox AS this
        WHERE state IN {OPEN} AND (lane = 'control' OR NOT EXISTS (
            SELECT 1 FROM inbox AS other WHERE other.platform = this.platform AND other.account = this.account
            AND other.place = this.place AND other.conversation = this.conversation AND other.id < this.id
            AND other.lane = 'turn' AND other.state IN {OPEN}))
    ), ranked AS (
        SELECT *, row_number() OVER (PARTITION BY lane, platform, account, channel ORDER BY state = 'new', id) AS rank
        FROM head
    ), placed AS (
        SELECT *, row_number() OVER (PARTITION BY lane, platform, account ORDER BY state = 'new', rank, id) AS number
        FROM ranked
    )
    SELECT inbox.* FROM placed JOIN inbox ON inbox.id = placed.id
    WHERE placed.state IN ('new', 'generated') AND (placed.lane = 'control' OR number <= ?)
    ORDER BY placed.lane, strikes DESC, rank, placed.id
"""


@dataclass(frozen=True, slots=True)
class InboxRow:
    """One row, decrypted and parsed."""

    id: int
    lane: Lane
    kind: Kind
    address: Address
    user_hash: str
    language: str
    update_key: str
    received_ms: int
    strikes: int
    suspect: bool
    text: str = ""
    command: Call | BadCommand | None = None  # or the error to report to its author
    attachments: tuple[Attachment, ...] = ()
    action: str = ""
    value: str = ""
    answers: str = ""
    public: bool = False
    moderates: bool = False
    second_hand: bool = False
    shed: bool = False  # beyond MAX_OPEN_PERSON: only refused
    oversize: int = 0  # characters of a text that was too long to store
    readable: bool = True  # whether its payload could be decrypted


def accept(tx: Tx, incoming: Incoming) -> int | None:
    """Store one update: its row id, or None for a repeat. Raises Overloaded where an account has MAX_OPEN open turns.

    Of a person with MAX_OPEN_PERSON open rows it is stored as refused: with a notice, or closed where there was one.
    """
    text, command = clean(incoming.text), clean(incoming.command)
    oversize = len(text) if len(text) > MAX_TEXT else 0
    if oversize:
        text = ""
    elif not command and incoming.kind is Kind.MESSAGE and is_command(text):
        text, command = "", text
    to, lane = incoming.address, lane_of(command) if command else incoming.lane
    open_rows = f"SELECT count(*) FROM inbox WHERE state IN {OPEN} AND lane = ?"
    of_account = f"{open_rows} AND platform = ? AND account = ?"
    if lane is Lane.TURN and tx.value(of_account, [lane, to.platform, to.account]) >= MAX_OPEN:
        raise Overloaded(retry_after_s=30)
    user_hash = tx.cipher.hash_user(to.platform, to.account, incoming.user)
    shed = tx.value(f"{open_rows} AND user_hash = ?", [lane, user_hash]) >= MAX_OPEN_PERSON
    payload: dict[str, Any] = {
        "text": text,
        "command": command,
        "oversize": oversize,
        "attachments": [
            asdict(replace(one, name=clean(one.name), media_type=clean(one.media_type))) for one in incoming.attachments
        ],
        "action": incoming.action,
        "value": clean(incoming.value),
        "answers": incoming.answers,
        "public": incoming.public,
        "moderates": incoming.moderates,
        "second_hand": incoming.second_hand,
    }
    if shed:
        payload = {"shed": True}
    state: dict[str, Value] = {"state": "new"}
    if shed and _has_notice(tx, user_hash):
        state = {"state": "done", "outcome": "refused_quietly", "closed_ms": tx.now_ms}
    return _insert(
        tx,
        **asdict(to),
        **state,
        user_hash=user_hash,
        lane=Lane.CONTROL if shed else lane,
        kind=incoming.kind,
        language=incoming.language,
        update_key=incoming.update_key,
        message_key=tx.cipher.hash_message(incoming.message_key) if incoming.message_key else "",
        payload=tx.cipher.seal(json.dumps(payload, ensure_ascii=False)),
    )


def _has_notice(tx: Tx, user_hash: str) -> bool:
    """Whether this person was, or is being, told of a limit."""
    told = f"(state IN {OPEN} AND lane = 'control') OR (outcome = 'limited' AND closed_ms > ?)"
    sql = f"SELECT 1 FROM inbox WHERE user_hash = ? AND received_ms > ? AND ({told})"
    since = tx.now_ms - _NOTICE_MS
    return bool(tx.value(sql, [user_hash, since - _NOTICE_MS, since]))


def rows_since(tx: Tx, user_hash: str, since_ms: int) -> int:
    """How many messages of this person were accepted."""
    return int(tx.value("SELECT count(*) FROM inbox WHERE user_hash = ? AND received_ms > ?", [user_hash, since_ms]))


def accept_dead(tx: Tx, platform: str, account: str, update_key: str, raw: str) -> None:
    """Store an update that cannot be parsed, so that it can be acknowledged."""
    _insert(
        tx,
        platform=platform,
        account=account,
        **dict.fromkeys(("place", "conversation", "reply_to", "user_hash", "language", "message_key"), ""),
        lane=Lane.CONTROL,
        kind=Kind.MESSAGE,
        update_key=update_key,
        payload=tx.cipher.seal(clean(raw)[:MAX_TEXT]),
        state="dead",
        outcome="unreadable",
        closed_ms=tx.now_ms,
    )


def _insert(tx: Tx, **columns: Value) -> int | None:
    """Its id, or None where the update is stored already."""
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    sql = f"INSERT INTO inbox ({names}, received_ms) VALUES ({marks}, ?) ON CONFLICT DO NOTHING RETURNING id"
    return tx.value(sql, [*columns.values(), tx.now_ms])  # type: ignore[no-any-return]


def recover(tx: Tx) -> int:
    """At start: rows that a crash has cut run again; the number of suspects. One process owns the home: no leases."""
    tx.run(f"UPDATE inbox SET strikes = 0 WHERE strikes > 0 AND begun <> 'alone' AND state IN {OPEN}")
    tx.run(
        "UPDATE inbox SET state = replace(state, 'running', 'new'), attempts = attempts + 1, begun = '',"
        " strikes = strikes + (begun = 'alone'), suspect = suspect OR begun = 'beside' OR attempts + 1 >= ?"
        " WHERE state = 'running' OR (state = 'generated' AND begun <> '')",
        [MAX_CRASHES],
    )
    return int(tx.value(f"SELECT count(*) FROM inbox WHERE suspect AND state IN {OPEN}"))


def release(tx: Tx) -> None:
    """At a clean stop: what is left open starts anew, and is no suspect for it."""
    tx.run(f"UPDATE inbox SET state = replace(state, 'running', 'new'), begun = '' WHERE state IN {OPEN}")


def take(tx: Tx, limit: int, accounts: Collection[tuple[str, str]], active: Collection[int]) -> list[InboxRow]:
    """Take the rows to handle now: control rows, and the oldest open turn of each conversation.

    At most `limit` turns of one account run at once, so that an unavailable platform delays no other; a free place goes
    to the channel with the fewest. One suspect runs at a time. `accounts` are the (platform, account) pairs with a
    running bot, `active` the ids of the rows in work.
    """
    rows = tx.all(_DUE, [limit])
    due = [row for row in rows if row["id"] not in active and (row["platform"], row["account"]) in accounts]
    suspects = [row for row in due if row["suspect"]]
    one_runs = tx.value(f"SELECT 1 FROM inbox WHERE begun = 'alone' AND state IN {OPEN}")
    taken = [*(row for row in due if not row["suspect"]), *([] if one_runs else suspects[:1])]
    for row in taken:
        begun = "alone" if row["suspect"] else "taken"
        tx.run("UPDATE inbox SET state = replace(state, 'new', 'running'), begun = ? WHERE id = ?", [begun, row["id"]])
    return [_row(tx, row) for row in taken]


def mark_started(tx: Tx, row: InboxRow) -> None:
    """The engine generates it now: after a crash it is a suspect."""
    tx.run("UPDATE inbox SET begun = 'beside' WHERE id = ? AND begun = 'taken'", [row.id])


def mark_generated(tx: Tx, inbox_id: int) -> None:
    """Its text is stored, so it was not what a later crash is about. A clean stop may have released it meanwhile."""
    sql = "UPDATE inbox SET state = 'generated', begun = 'taken' WHERE id = ? AND state IN ('new', 'running')"
    tx.run(sql, [inbox_id])


def get(tx: Tx, inbox_id: int) -> InboxRow:
    """A row that exists, as it is now."""
    return _row(tx, tx.all("SELECT * FROM inbox WHERE id = ?", [inbox_id])[0])


def unanswered(tx: Tx, inbox_id: int, at: Address, user_hash: str) -> InboxRow | None:
    """The person's last question in a conversation before this row, where it ended without an answer."""
    sql = f"SELECT * FROM inbox NOT INDEXED WHERE id < ? AND lane = 'turn' AND kind = 'message' AND {_HERE}"
    for row in tx.all(f"{sql} ORDER BY id DESC LIMIT {_LOOKED_BACK}", [inbox_id, *_here(at)]):
        found = _row(tx, row)
        if isinstance(found.command, Call) and found.command.command.name == "new":
            return None
        if found.text.strip() and not found.action and found.user_hash == user_hash:
            return found if row["outcome"] in _UNANSWERED else None
    return None


def take_over(tx: Tx, inbox_id: int, unanswered_id: int) -> None:
    """Make a row the question of another one, which ended without an answer."""
    tx.run(
        "UPDATE inbox SET payload = (SELECT payload FROM inbox WHERE id = ?) WHERE id = ?", [unanswered_id, inbox_id]
    )
    tx.run("UPDATE inbox SET payload = NULL, outcome = 'retried' WHERE id = ?", [unanswered_id])


def given_up(tx: Tx) -> list[InboxRow]:
    """Rows that were given up and still hold their text, newest first."""
    sql = "SELECT * FROM inbox WHERE state = 'dead' AND outcome <> 'unreadable' AND payload IS NOT NULL"
    return [_row(tx, row) for row in tx.all(f"{sql} ORDER BY id DESC LIMIT {_MOST_GIVEN_UP}")]


def reopen(tx: Tx, inbox_id: int) -> None:
    """Handle a row that was given up once more, alone."""
    tx.run(
        "UPDATE inbox SET state = 'new', outcome = '', closed_ms = NULL, attempts = 0, strikes = 0, suspect = 1,"
        " begun = '' WHERE id = ? AND state = 'dead'",
        [inbox_id],
    )


def is_generated(tx: Tx, inbox_id: int) -> bool:
    """Whether its text is stored and only the delivery is left."""
    return bool(tx.value("SELECT state = 'generated' FROM inbox WHERE id = ?", [inbox_id]))


def close(tx: Tx, inbox_id: int, outcome: str, *, dead: bool = False) -> None:
    """Close a row as done or dead. A closed row stays as it is."""
    sql = "UPDATE inbox SET state = ?, outcome = ?, closed_ms = ? WHERE id = ? AND state NOT IN ('done', 'dead')"
    tx.run(sql, ["dead" if dead else "done", outcome, tx.now_ms, inbox_id])


def controls_after(tx: Tx, row: InboxRow) -> list[InboxRow]:
    """Control rows (stops, presses) of the same conversation after this turn."""
    sql = f"SELECT * FROM inbox NOT INDEXED WHERE id > ? AND lane = 'control' AND {_HERE}"
    return [_row(tx, one) for one in tx.all(sql, [row.id, *_here(row.address)])]


def turn_before_closed_ms(tx: Tx, row: InboxRow) -> int | None:
    """When the turn before this one was closed; None where it is open, or there is none."""
    sql = f"SELECT closed_ms FROM inbox NOT INDEXED WHERE id < ? AND lane = 'turn' AND {_HERE} ORDER BY id DESC LIMIT 1"
    return tx.value(sql, [row.id, *_here(row.address)])  # type: ignore[no-any-return]


def open_rows(tx: Tx, platform: str, account: str) -> int:
    """Open rows of this account, and undelivered messages of its jobs."""
    sql = (
        "SELECT (SELECT count(*) FROM inbox WHERE platform = ?1 AND account = ?2 AND state IN ('new', 'running',"
        " 'generated')) + (SELECT count(*) FROM delivery JOIN job ON job.id = delivery.job_id"
        " WHERE job.platform = ?1 AND job.account = ?2 AND delivery.state IN ('open', 'generated'))"
    )
    return int(tx.value(sql, [platform, account]))


def limited_lately(tx: Tx, row: InboxRow, window_ms: int) -> bool:
    """Whether a limit was reported to this person in this place within the window."""
    sql = "SELECT 1 FROM inbox WHERE user_hash = ? AND place = ? AND outcome = 'limited' AND closed_ms > ?"
    return bool(tx.value(sql, [row.user_hash, row.address.place, tx.now_ms - window_ms]))


def is_forgotten(tx: Tx, inbox_id: int) -> bool:
    """Whether its person was erased after it was accepted."""
    return bool(tx.value("SELECT outcome = 'forgotten' FROM inbox WHERE id = ?", [inbox_id]))


def running_user(tx: Tx, at: Address) -> str | None:
    """Who asked for the reply that is being written in that conversation."""
    sql = f"SELECT user_hash FROM inbox WHERE {_HERE} AND lane = 'turn' AND state = 'running'"
    return tx.value(sql, _here(at))  # type: ignore[no-any-return]


def has_message(tx: Tx, platform: str, account: str, message_key: str) -> bool:
    """Whether that message was accepted."""
    asked = "SELECT 1 FROM inbox WHERE platform = ? AND account = ? AND message_key = ?"
    return bool(tx.value(asked, [platform, account, tx.cipher.hash_message(message_key)]))


def clean(text: str) -> str:
    """Text that SQLite, JSON and every platform accept: no NUL, no lone surrogate."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8") if text else text


def _here(at: Address) -> list[Value]:
    return [at.platform, at.account, at.place, at.conversation]


def _row(tx: Tx, row: Row) -> InboxRow:
    readable = True
    try:
        payload = json.loads(tx.cipher.unseal(row["payload"])) if row["payload"] else {}
    except StoredUnreadable:  # the handler refuses it
        payload, readable = {}, False
    payload["command"] = read(payload["command"]) if payload.get("command") else None
    payload["attachments"] = tuple(Attachment(**given) for given in payload.get("attachments", ()))
    own = {name: row[name] for name in ("id", "user_hash", "language", "update_key", "received_ms", "strikes")}
    own["suspect"] = bool(row["suspect"])
    address = Address(*(row[one.name] for one in fields(Address)))
    return InboxRow(
        lane=Lane(row["lane"]), kind=Kind(row["kind"]), address=address, readable=readable, **own, **payload
    )


def move_place(tx: Tx, platform: str, account: str, before: str, now: str) -> None:
    """Rename a place that the platform has renamed."""
    sql = "UPDATE OR IGNORE inbox SET place = ? WHERE platform = ? AND account = ? AND place = ?"
    tx.run(sql, [now, platform, account, before])


def open_by_state(tx: Tx) -> dict[str, int]:
    rows = tx.all(f"SELECT state, count(*) AS n FROM inbox WHERE state IN {OPEN} GROUP BY 1")
    return {"new": 0, "running": 0, "generated": 0} | {row["state"]: row["n"] for row in rows}


def oldest_open_s(tx: Tx) -> float:
    """Age of the oldest open message; 0 where none is open."""
    oldest = tx.value(f"SELECT min(received_ms) FROM inbox WHERE state IN {OPEN}")
    return 0 if oldest is None else max(0, tx.now_ms - oldest) / 1000


def dead_by_outcome(tx: Tx) -> dict[str, int]:
    rows = tx.all("SELECT outcome, count(*) AS n FROM inbox WHERE state = 'dead' GROUP BY 1")
    return {row["outcome"]: row["n"] for row in rows}


@lifecycle.erases(Stage.TEXT)
def _erase(tx: Tx, erasure: Erasure) -> None:
    rows = "WHERE user_hash = ? AND received_ms <= ? AND id <> ?"
    who: list[Value] = [erasure.user_hash, erasure.until_ms, erasure.keep_row]
    tx.run(f"UPDATE inbox SET payload = NULL {rows}", who)
    tx.run(
        f"UPDATE inbox SET state = 'done', outcome = 'forgotten', closed_ms = ? {rows} AND state IN {OPEN}",
        [tx.now_ms, *who],
    )


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    """Addresses go when nothing can be written there any more; a forgotten person's hash after the longest limit."""
    payload = "UPDATE inbox SET payload = NULL"
    closed = "place <> '' AND state IN ('done', 'dead') AND closed_ms <= ?"
    forgotten = (
        "user_hash <> '' AND received_ms <= ? AND EXISTS (SELECT 1 FROM erasure"
        " WHERE erasure.user_hash = inbox.user_hash AND erasure.at_ms >= received_ms)"
    )
    return [
        lifecycle.batch(payload, "payload IS NOT NULL AND state = 'done' AND closed_ms <= ?", kept.payload),
        lifecycle.batch(payload, "payload IS NOT NULL AND state = 'dead' AND closed_ms <= ?", kept.dead),
        lifecycle.batch("UPDATE inbox SET place = '', conversation = '', reply_to = ''", closed, kept.dead),
        lifecycle.batch("UPDATE inbox SET user_hash = ''", forgotten, HOUR_MS),
    ]
