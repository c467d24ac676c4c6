"""Handlers of the commands, each registered by a decorator where its work is.

    @command("adapter", "promote")
    def promote(tx: Tx, caller: Caller, call: Call) -> Outcome: ...

    @command("usage", "csv", prepare=write_csv)
    def usage_csv(tx: Tx, caller: Caller, call: Call, path: Path) -> Outcome: ...

A handler runs in one transaction. `prepare` runs before it, without a transaction, for files and downloads; its result
is the handler's last argument. `check` raises where the command cannot run at the moment (a queue is full): it is
called before `prepare` and again in the transaction. Grants are checked before all three (core.chat.dispatch).
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from core.commands.table import COMMANDS, Call
from core.storage.database import Database, Tx
from core.storage.home import Home
from core.types import Address, Attachment, Caller, Outcome

P = TypeVar("P")
Fetch = Callable[[Address, Attachment], AsyncIterator[bytes]]
Handler = Callable[[Tx, Caller, Call], Outcome]
PreparedHandler = Callable[[Tx, Caller, Call, P], Outcome]
Check = Callable[[Tx, Caller], object]


@dataclass(frozen=True, slots=True)
class CommandContext:
    """What `prepare` may use. `fetch` streams a file that a person sent."""

    home: Home
    database: Database
    fetch: Fetch


Prepare = Callable[[CommandContext, Caller, Call], Awaitable[P]]


@dataclass(frozen=True, slots=True)
class Registered:
    """One entry: `handler` takes the result of `prepare` as a fourth argument where there is a `prepare`."""

    handler: Callable[..., Outcome]
    prepare: Prepare[Any] | None = None
    check: Check | None = None


_registered: dict[tuple[str, str], Registered] = {}


@overload
def command(name: str, word: str = "", *, check: Check | None = None) -> Callable[[Handler], Handler]: ...


@overload
def command(
    name: str, word: str = "", *, prepare: Prepare[P], check: Check | None = None
) -> Callable[[PreparedHandler[P]], PreparedHandler[P]]: ...


def command(
    name: str, word: str = "", *, prepare: Prepare[Any] | None = None, check: Check | None = None
) -> Callable[[Any], Any]:
    """Register the handler of one form. Raises LookupError where the table has no such form, or it has a handler."""

    def register(handler: Any) -> Any:
        key = (name, word)
        if key not in _forms():
            raise LookupError(f"{handler.__module__}.{handler.__name__}: the command table has no /{name} {word}")
        if key in _registered:
            raise LookupError(f"{handler.__module__}.{handler.__name__}: /{name} {word} has a handler already")
        _registered[key] = Registered(handler, prepare, check)
        return handler

    return register


def registered(call: Call) -> Registered:
    return _registered[call.key]


def check_complete() -> None:
    """Raises LookupError with every form of the table that has no handler."""
    if missing := [f"/{name} {word}".strip() for name, word in _forms() if (name, word) not in _registered]:
        raise LookupError(f"no handler is registered for {', '.join(missing)}")


def _forms() -> list[tuple[str, str]]:
    return [(one.name, form.word) for one in COMMANDS for form in one.forms]
