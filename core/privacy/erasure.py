"""What people may ask of their data: /privacy, /consent, /forget. Knows rows; files and periods are
core.privacy.retention's.

/forget writes a tombstone first, then erases, all in the transaction of the command. The tombstone is also kept in a
file beside the database, so that a database brought back from a copy forgets the same people again before it serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from core.adapters import registry
from core.channels import adapter_names, audit
from core.channels.commands import Handler
from core.chat import feedback
from core.commands.table import Call
from core.errors import UnknownThing
from core.i18n.messages import Lazy, duration, say
from core.jobs import jobs
from core.privacy.retention import clean, keep_clean, kept_tombstones, retention_of, sweep, tombstones, try_sweep
from core.storage.database import Database, Tx, Value
from core.storage.home import Home
from core.types import After, Body, Button, Caller, Choose, EraseFiles, ForgetMemory, Outcome, StopReply, WakeTraining

__all__ = ["HANDLERS", "clean", "erase", "keep_clean", "reapply", "sweep", "try_sweep"]

ERASED = "erased"


# --- commands ---


def privacy(tx: Tx, caller: Caller, call: Call) -> Outcome:
    kept = retention_of(tx)
    language = caller.language
    text = say(
        language,
        "privacy.what",
        title=caller.channel.title,
        conversation=duration(language, kept.conversation_hours * 3600),
        payload=duration(language, kept.payload_minutes * 60),
        consent=_consent_state(tx, caller),
    )
    return Outcome(Body(text))


def consent(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """Per person and channel. Off also erases the data sets that hold what the person said here."""
    choice = call.arguments.get("choice", "")
    key: list[Value] = [caller.user, caller.channel.id]
    if not choice:
        state = _consent_state(tx, caller).render(caller.language)
        return Outcome(Body(f"{state} {say(caller.language, 'privacy.consent_how')}"))
    title = caller.channel.title
    if choice == "on":
        tx.run("INSERT OR IGNORE INTO consent VALUES (?, ?, ?)", [*key, tx.now_ms])
        return Outcome(Body(say(caller.language, "privacy.consent_on", title=title)))
    tx.run("DELETE FROM consent WHERE user_hash = ? AND channel_id = ?", key)
    tx.run("DELETE FROM example WHERE user_hash = ? AND channel_id = ?", key)
    after = (
        (EraseFiles(), WakeTraining()) if _erase_datasets(tx, _datasets_of(tx, caller.user, caller.channel.id)) else ()
    )
    return Outcome(Body(say(caller.language, "privacy.consent_off", title=title)), after)


def consent_reply(tx: Tx, caller: Caller, call: Call) -> Outcome:
    """For one reply that the person was given. A no to what was allowed also erases the data sets that may hold it."""
    reply = feedback.own_reply(tx, caller.user, call.arguments["reply"])
    if reply is None:
        raise UnknownThing("feedback.no_reply_of_yours")
    if call.arguments["choice"] == "yes":
        feedback.share(tx, reply)
        return Outcome(Body(say(caller.language, "feedback.shared")))
    after: tuple[After, ...] = ()
    if feedback.refuse(tx, reply) and _erase_datasets(tx, _datasets_of(tx, caller.user, reply.channel_id)):
        after = (EraseFiles(), WakeTraining())
    return Outcome(Body(say(caller.language, "feedback.not_shared")), after)


def forget(tx: Tx, caller: Caller, call: Call) -> Outcome:
    if call.arguments.get("choice") != "yes":
        button = Button(say(caller.language, "privacy.forget_button"), "command", "/forget yes")
        return Outcome(Body(say(caller.language, "privacy.forget_ask"), (button,)))
    memories = _conversations_of(tx, caller.user)
    tx.insert("erasure", user_hash=caller.user, at_ms=tx.now_ms)
    unpublished = erase(tx, caller.user, tx.now_ms, keep_row=caller.inbox_id)
    for label, now in unpublished:
        audit.record(tx, replace(caller, user=ERASED), "adapter unpublish", label, label, now)
    text = say(caller.language, "privacy.forgotten")
    return Outcome(Body(text), (StopReply(caller.user), *memories, EraseFiles(), WakeTraining(), Choose()))


HANDLERS: Mapping[tuple[str, str], Handler] = {
    ("privacy", ""): privacy,
    ("consent", ""): consent,
    ("consent", "reply"): consent_reply,
    ("forget", ""): forget,
}


# --- erasing ---


def erase(tx: Tx, user_hash: str, until_ms: int, *, keep_row: int = 0) -> list[tuple[str, str]]:
    """Remove what is stored of a person up to a moment: (label, version that answers now) of each adapter withdrawn.


    Charges and counts stay: they hold no text, and core.privacy.retention takes the person out of them. `keep_row` is
    the message that asks for it: it still has to be answered.
    """
    who: list[Value] = [user_hash, until_ms]
    tx.run("DELETE FROM turn WHERE user_hash = ? AND at_ms <= ?", who)
    tx.run("DELETE FROM feedback WHERE user_hash = ? AND at_ms <= ?", who)
    tx.run("DELETE FROM example WHERE user_hash = ? AND at_ms <= ?", who)
    tx.run("UPDATE example SET correction = NULL, corrected_by = NULL WHERE corrected_by = ? AND at_ms <= ?", who)
    tx.run("UPDATE comparison SET question = NULL WHERE actor = ? AND at_ms <= ?", who)
    tx.run("DELETE FROM consent WHERE user_hash = ? AND granted_ms <= ?", who)
    tx.run("DELETE FROM person WHERE user_hash = ? AND first_ms <= ?", who)
    rows = "SELECT id FROM inbox WHERE user_hash = ? AND received_ms <= ? AND id <> ?"
    tx.run(f"UPDATE delivery SET body = NULL WHERE inbox_id IN ({rows})", [*who, keep_row])
    tx.run(f"UPDATE inbox SET payload = NULL WHERE id IN ({rows})", [*who, keep_row])
    tx.run(
        "UPDATE generation SET state = 'failed', ended_ms = ? WHERE state <> 'delivered'"
        f" AND inbox_id IN ({rows} AND state IN ('new', 'running', 'generated'))",
        [tx.now_ms, *who, keep_row],
    )
    tx.run(
        "UPDATE inbox SET state = 'done', outcome = 'forgotten', closed_ms = ?"
        f" WHERE id IN ({rows} AND state IN ('new', 'running', 'generated'))",
        [tx.now_ms, *who, keep_row],
    )
    datasets = _datasets_of(tx, user_hash)
    _erase_datasets(tx, datasets)
    unpublished = _unpublish(tx, datasets)
    tx.run("DELETE FROM dataset_person WHERE user_hash = ?", [user_hash])
    return unpublished


async def reapply(database: Database, home: Home) -> None:
    """At start, before anything is answered: a database from a copy forgets again whom it should have forgotten."""
    known = await asyncio.to_thread(kept_tombstones, home)

    def work(tx: Tx) -> None:
        for user_hash, at_ms in sorted(known - tombstones(tx)):
            tx.insert("erasure", user_hash=user_hash, at_ms=at_ms)
            erase(tx, user_hash, at_ms)

    await database.write(work)
    await try_sweep(database, home)


def _consent_state(tx: Tx, caller: Caller) -> Lazy:
    """What a person allows here: all, single replies, or nothing."""
    key: list[Value] = [caller.user, caller.channel.id]
    if tx.value("SELECT 1 FROM consent WHERE user_hash = ? AND channel_id = ?", key):
        return Lazy("privacy.consent_is_on")
    shared = int(tx.value("SELECT count(*) FROM example WHERE user_hash = ? AND channel_id = ? AND shared = 1", key))
    return Lazy("privacy.consent_is_for_some", n=shared) if shared else Lazy("privacy.consent_is_off")


def _conversations_of(tx: Tx, user_hash: str) -> list[ForgetMemory]:
    rows = tx.all(
        "SELECT DISTINCT channel.name, conversation_id FROM turn JOIN conversation ON conversation.id = conversation_id"
        " JOIN channel ON channel.id = channel_id WHERE turn.user_hash = ?",
        [user_hash],
    )
    return [ForgetMemory(row["name"], str(row["conversation_id"])) for row in rows]


def _datasets_of(tx: Tx, user_hash: str, channel_id: int | None = None) -> list[str]:
    """Those that hold what the person said; of one channel, or of all."""
    rows = tx.all(
        "SELECT DISTINCT dataset_sha256 FROM dataset_person WHERE user_hash = ? AND (? IS NULL OR NOT EXISTS"
        " (SELECT 1 FROM job WHERE job.dataset_sha256 = dataset_person.dataset_sha256 AND job.channel_id <> ?))",
        [user_hash, channel_id, channel_id],
    )
    return [row["dataset_sha256"] for row in rows]


def _erase_datasets(tx: Tx, datasets: list[str]) -> bool:
    """Their files go with the next sweep; jobs that read them end. Whether there was anything to do."""
    for sha256 in datasets:
        tx.run("UPDATE dataset SET erased_ms = ? WHERE sha256 = ? AND erased_ms IS NULL", [tx.now_ms, sha256])
        for row in tx.all("SELECT id FROM job WHERE dataset_sha256 = ? AND ended_ms IS NULL", [sha256]):
            jobs.cancel(tx, row["id"], ERASED)
    return bool(datasets)


def _unpublish(tx: Tx, datasets: list[str]) -> list[tuple[str, str]]:
    """What learned from them is not used any more; the weights go with the next sweep, discarded before or not."""
    unpublished = []
    for sha256 in datasets:
        for row in tx.all("SELECT sha256 FROM adapter WHERE dataset_sha256 = ? AND unpublished_ms IS NULL", [sha256]):
            version = registry.by_sha(tx, row["sha256"])
            registry.unpublish(tx, version.sha256, ERASED)
            unpublished.append((version.label, adapter_names.champion(tx, version.name)[1]))
        tx.run("UPDATE adapter SET unpublished_reason = ? WHERE dataset_sha256 = ?", [ERASED, sha256])
    return unpublished
