"""Deliveries: one text each, written in parts through the sink of its account.

The order of the commits makes it exactly-once: a handle before anything final is written through it, the final text
before its first part, the last receipt together with what the caller settles. After a crash at any point `open` or
`finish` goes on, and neither writes a second final message.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from core.errors import AppError, BadInput
from core.platform import MessageSink, Reopened, SupportsChoose, SupportsFetch, SupportsOrphans
from core.storage import lifecycle
from core.storage.database import Database, Tx
from core.storage.lifecycle import Erasure, Periods, Prune, Stage
from core.types import Address, Attachment, Body, Handle, Receipt

log = logging.getLogger(__name__)
_BODY = TypeAdapter(Body)
_CHOOSE_S = 15.0
_GONE_TWICE = "the message that replaces a deleted one is gone as well"


@dataclass(slots=True)
class Deliveries:
    """Writes deliveries through the registered sinks, one for each platform and account."""

    database: Database
    on_register: Callable[[str, str], None] | None = None  # called with platform and account
    _left: int = 0  # first messages that a crash may have left: posted, but the handle not committed
    _sinks: dict[tuple[str, str], MessageSink] = field(default_factory=dict)

    @property
    def orphans(self) -> int:
        """First messages that may be visible without an answer, after a crash or a lost response."""
        return self._left + sum(one.orphans for one in self._sinks.values() if isinstance(one, SupportsOrphans))

    def register(self, platform: str, account: str, sink: MessageSink) -> None:
        self._sinks[platform, account] = sink
        if self.on_register is not None:
            self.on_register(platform, account)

    def reaches(self, to: Address) -> bool:
        """Whether a bot for this address is running."""
        return (to.platform, to.account) in self._sinks

    def _sink(self, to: Address) -> MessageSink:
        if not self.reaches(to):
            raise AppError(detail=f"no bot is running for {to.platform} {to.account}")
        return self._sinks[to.platform, to.account]

    def fetch(self, to: Address, attachment: Attachment) -> AsyncIterator[bytes]:
        """The content of a file that was sent there. Raises BadInput where the platform cannot give it."""
        sink = self._sink(to)
        if not isinstance(sink, SupportsFetch):
            raise BadInput("training.no_files_here")
        return sink.fetch(attachment)

    async def choose(self, to: Address, label: str) -> None:
        """Replace the pressed buttons by the chosen label. Best effort."""
        try:
            async with asyncio.timeout(_CHOOSE_S):
                if isinstance(sink := self._sink(to), SupportsChoose):
                    await sink.choose(to, label)
        except Exception as error:  # a sink may raise anything; the answer is delivered already
            log.info("delivery.not_chosen", extra={"error": type(error).__name__})

    async def open(self, delivery_id: int, to: Address) -> Handle:
        """The committed handle of part 1: that of an earlier attempt, recovered, or a new one."""
        sink = self._sink(to)
        left, _ = await self.database.read(lambda tx: _part(tx, delivery_id, 1))
        if left is not None:
            handle = await sink.recover(left)
            if handle == left:
                return handle
        else:
            self._left += await self.database.read(lambda tx: _begun_before(tx, delivery_id))
            handle = await sink.open(to)
        await self._keep_handle(delivery_id, 1, handle)
        return handle

    async def show(self, handle: Handle, to: Address, text: str) -> None:
        await self._sink(to).show(handle, text)

    async def finish(self, delivery_id: int, to: Address, body: Body, settle: Callable[[Tx], None]) -> None:
        """Write the committed body part by part; `settle` runs in the transaction of the last receipt."""
        parts = self._sink(to).split(body)
        for number, part in enumerate(parts, start=1):
            await self._finish_part(delivery_id, number, to, part, settle if number == len(parts) else None)

    async def fail(self, delivery_id: int, to: Address, body: Body, settle: Callable[[Tx], None]) -> None:
        """End the delivery visibly; `settle` runs in the transaction that closes it."""
        handle, sink = await self.open(delivery_id, to), self._sink(to)
        reopened = await sink.fail(handle, body)
        if reopened is not None:
            await self._keep_handle(delivery_id, 1, reopened.handle)
            if await sink.fail(reopened.handle, body) is not None:
                raise AppError(detail=_GONE_TWICE)

        def close(tx: Tx) -> None:
            give_up(tx, delivery_id)
            settle(tx)

        await self.database.write(close)

    async def _finish_part(
        self, delivery_id: int, number: int, to: Address, part: Body, settle: Callable[[Tx], None] | None
    ) -> None:
        sink = self._sink(to)
        handle, receipt = await self.database.read(lambda tx: _part(tx, delivery_id, number))
        if receipt is None:
            if handle is None:
                handle = await sink.open(to)
                await self._keep_handle(delivery_id, number, handle)
            ended = await sink.finish(handle, part)
            if isinstance(ended, Reopened):
                await self._keep_handle(delivery_id, number, ended.handle)
                ended = await sink.finish(ended.handle, part)
            if isinstance(ended, Reopened):
                raise AppError(detail=_GONE_TWICE)
            receipt = ended
        await self.database.write(lambda tx: _keep_receipt(tx, delivery_id, number, receipt, settle))

    async def _keep_handle(self, delivery_id: int, number: int, handle: Handle) -> None:
        new = "INSERT INTO part (delivery_id, number, handle) VALUES (?, ?, ?)"
        sql = f"{new} ON CONFLICT DO UPDATE SET handle = excluded.handle"
        await self.database.write(lambda tx: tx.run(sql, [delivery_id, number, handle]))


# --- rows: run inside a transaction ---


def new_delivery(tx: Tx, *, inbox_id: int | None = None, job_id: int | None = None) -> int:
    """The delivery of an inbox row or of a job: created once, found again after a crash."""
    column, value = ("inbox_id", inbox_id) if inbox_id is not None else ("job_id", job_id)
    found = tx.value(f"SELECT id FROM delivery WHERE {column} = ?", [value])
    return int(found) if found else tx.insert("delivery", **{column: value, "state": "open"})


def keep_body(tx: Tx, delivery_id: int, body: Body) -> None:
    """Store the final text, before its first part is written."""
    sealed = tx.cipher.seal(_BODY.dump_json(body).decode())
    tx.run("UPDATE delivery SET state = 'generated', body = ? WHERE id = ?", [sealed, delivery_id])


def kept_body(tx: Tx, delivery_id: int) -> Body | None:
    """The stored final text, or None."""
    sealed = tx.value("SELECT body FROM delivery WHERE id = ? AND state = 'generated'", [delivery_id])
    return _BODY.validate_json(tx.cipher.unseal(sealed)) if sealed else None


def give_up(tx: Tx, delivery_id: int) -> None:
    """Close it undelivered."""
    tx.run("UPDATE delivery SET state = 'failed', body = NULL WHERE id = ?", [delivery_id])


def skip(tx: Tx, delivery_id: int) -> None:
    """Close it as done without a message."""
    tx.run("UPDATE delivery SET state = 'done', body = NULL WHERE id = ?", [delivery_id])


def renew(tx: Tx, *, inbox_id: int | None = None, job_id: int | None = None) -> None:
    """Begin a new message for the row or the job; the earlier one stays as it is."""
    delivery_id = new_delivery(tx, inbox_id=inbox_id, job_id=job_id)
    tx.run("DELETE FROM part WHERE delivery_id = ?", [delivery_id])
    tx.run("DELETE FROM delivery WHERE id = ?", [delivery_id])
    new_delivery(tx, inbox_id=inbox_id, job_id=job_id)


def _begun_before(tx: Tx, delivery_id: int) -> bool:
    """Whether an earlier process began to handle its row."""
    sql = "SELECT attempts > 0 FROM inbox JOIN delivery ON inbox.id = inbox_id WHERE delivery.id = ?"
    return bool(tx.value(sql, [delivery_id]))


def _part(tx: Tx, delivery_id: int, number: int) -> tuple[Handle | None, Receipt | None]:
    row = tx.one("SELECT handle, receipt FROM part WHERE delivery_id = ? AND number = ?", [delivery_id, number])
    return (Handle(row["handle"]), Receipt(row["receipt"]) if row["receipt"] else None) if row else (None, None)


def _keep_receipt(tx: Tx, delivery_id: int, number: int, receipt: Receipt, settle: Callable[[Tx], None] | None) -> None:
    tx.run("UPDATE part SET receipt = ? WHERE delivery_id = ? AND number = ?", [receipt, delivery_id, number])
    if settle is not None:
        tx.run("UPDATE delivery SET state = 'done', body = NULL WHERE id = ?", [delivery_id])
        settle(tx)


@lifecycle.erases(Stage.TEXT)
def _erase(tx: Tx, erasure: Erasure) -> None:
    tx.run(
        "UPDATE delivery SET body = NULL WHERE inbox_id IN"
        " (SELECT id FROM inbox WHERE user_hash = ? AND received_ms <= ? AND id <> ?)",
        [erasure.user_hash, erasure.until_ms, erasure.keep_row],
    )


@lifecycle.prunes
def _prunes(kept: Periods) -> list[Prune]:
    """Bodies go with the text of their message; handles and receipts name a place, and go with the place."""
    closed = "inbox.state IN ('done', 'dead') AND closed_ms <= ?"
    sent = (
        "ended_ms <= ? AND NOT EXISTS (SELECT 1 FROM delivery WHERE job_id = job.id AND state IN ('open', 'generated'))"
    )
    return [
        lifecycle.batch(
            "UPDATE delivery SET body = NULL",
            f"body IS NOT NULL AND EXISTS (SELECT 1 FROM inbox WHERE inbox.id = inbox_id AND {closed})",
            kept.payload,
        ),
        *(
            lifecycle.batch(
                "UPDATE part SET handle = '', receipt = ''",
                f"handle <> '' AND delivery_id IN (SELECT delivery.id FROM delivery JOIN {ended})",
                kept.dead,
                key="delivery_id",
            )
            for ended in (f"inbox ON inbox.id = inbox_id WHERE {closed}", f"job ON job.id = job_id WHERE {sent}")
        ),
    ]
