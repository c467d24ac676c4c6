"""A directory with two channels and six people, and a way to give commands as one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from core.channels import bindings, directory, operators, terminal
from core.chat import conversations, dispatch
from core.commands.parser import parse
from core.commands.table import Call
from core.jobs.commands import PreparedData
from core.jobs.importing import UnpackedAdapter
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.types import Address, Caller, Outcome, Role
from tests.support.database import read_now, write_now

DATASET = "d" * 64
ROLES = ("stranger", "user", "other_operator", "operator", "owner", "removed")


@dataclass
class Roles:
    database: Database

    def hash(self, who: str) -> str:
        return self.database.cipher.hash_user("fake", "bot", who)

    def caller(self, tx: Tx, who: str, place: str = "acme", language: str = "en") -> Caller:
        at = Address("fake", "bot", place, "c")
        channel = bindings.channel_for(tx, "fake", "bot", place)
        assert channel is not None
        return Caller(self.hash(who), at, channel, language, 0, conversations.conversation_id(tx, at, channel.id))

    def run(self, who: str, text: str, place: str = "acme", language: str = "en", prepared: object = None) -> Outcome:
        """Give one command, in a transaction as the service does. Raises what the command raises.

        `prepared` is what the command's `prepare` returns; by default a plain value of its type.
        """
        call = parse(text)
        value = prepared_for(call) if prepared is None else prepared
        return write_now(self.database, lambda tx: dispatch.run(tx, self.caller(tx, who, place, language), call, value))

    def says(self, who: str, text: str, place: str = "acme", language: str = "en") -> str:
        return self.run(who, text, place, language).body.text

    def audit(self) -> list[dict[str, object]]:
        return read_now(self.database, lambda tx: tx.all("SELECT * FROM audit ORDER BY id"))

    def rows(self) -> dict[str, list[dict[str, object]]]:
        """All that is in the database, but for the audit log."""

        def read(tx: Tx) -> dict[str, list[dict[str, object]]]:
            names = tx.all("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%sqlite%'")
            return {row["name"]: tx.all(f"SELECT * FROM {row['name']}") for row in names if row["name"] != "audit"}

        return read_now(self.database, read)

    def operator_id(self, who: str) -> int:
        return int(
            read_now(
                self.database, lambda tx: tx.value("SELECT id FROM operator WHERE user_hash = ?", [self.hash(who)])
            )
        )


def prepared_for(call: Call) -> object:
    """What `prepare` would return, where no files are involved: a data set is named by its hash."""
    given = call.arguments
    match call.key:
        case ("finetune", ""):
            return PreparedData(given.get("dataset", DATASET), given.get("dataset", ""), given.get("go") == "yes")
        case ("finetune", "from"):
            return PreparedData(DATASET, given["source"], given.get("go") == "yes")
        case ("adapter", "import"):
            return UnpackedAdapter("new-1", "my-adapter.zip", DATASET, "faq.jsonl")
        case ("finetune", "preview" | "status"):
            return ()
        case ("usage", "chart" | "csv"):
            return Path("usage.x")
    return ""


def _settle(tx: Tx, roles: Roles) -> None:
    terminal.ensure_terminal(tx, "home")
    for name in ("acme", "delta"):
        channel = directory.create_channel(tx, name, title=name.title())
        bindings.bind(tx, "fake", "bot", name, channel.id)
    for who, name in (("other_operator", "delta"), ("operator", "acme"), ("removed", "acme")):
        operated = directory.channel_by_name(tx, name)
        assert operated is not None
        operators.grant(tx, roles.hash(who), operated.id, who, "test")
    operators.grant(tx, roles.hash("owner"), None, "owner", "test")
    for one in operators.find(tx):
        if one.label == "removed":
            operators.remove(tx, one)
    for place in ("acme", "delta"):
        ask(tx, roles.caller(tx, "user", place), f"a question in {place}", 1)


def ask(tx: Tx, caller: Caller, text: str, n: int) -> int:
    """What a question leaves that was answered; the row of its message."""
    at = caller.address
    inbox_id = tx.insert(
        "inbox",
        platform=at.platform,
        account=at.account,
        place=at.place,
        conversation=at.conversation,
        reply_to="",
        user_hash=caller.user,
        lane="turn",
        kind="message",
        language="",
        update_key=f"{at.place} {n}",
        message_key="",
        received_ms=tx.now_ms,
        state="done",
        outcome="command",
    )
    conversations.append(tx, caller.conversation_id, inbox_id, Role.USER, text, caller.user)
    conversations.append(tx, caller.conversation_id, inbox_id, Role.ASSISTANT, "an answer", caller.user)
    return inbox_id


@contextmanager
def open_roles(folder: Path) -> Iterator[Roles]:
    with Database(folder / "a.db", Cipher(b"k" * 32)) as database:
        made = Roles(database)
        write_now(database, lambda tx: _settle(tx, made))
        yield made
