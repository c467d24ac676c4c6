"""A bot's writing side, as the reply loop needs it. Knows nothing of listening, platforms or the store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from core.errors import AppError
from core.types import Address, Attachment, Body, Handle, Receipt


class Reopen(Exception):
    """Out of `finish` or `fail`: this handle holds nothing final. `recover` it, commit what it gives, then repeat."""


class Unreachable(AppError):
    """Nobody can be reached there any more: repeating is of no use."""

    key = "error.unreachable"


class MessageSink(Protocol):
    """Writes the parts of a delivery. Every method but `open` may be repeated without a second message.

    The caller commits a handle before anything final is written through it, and a receipt after.
    Any exception out of these methods means "outcome unknown": the caller recovers and repeats, or fails the handle.
    """

    def split(self, body: Body) -> tuple[Body, ...]:
        """Cut a final body into the parts that the platform holds; joined, their texts are the text. Pure."""
        ...

    async def open(self, to: Address) -> Handle:
        """Post the first small message, or open a stream. Where a lost answer leaves it unknown, once more at most."""
        ...

    async def show(self, handle: Handle, text: str) -> None:
        """Show the text so far: best effort, at the platform's pace; never raises for a slow or cut platform."""
        ...

    async def finish(self, handle: Handle, body: Body) -> Receipt:
        """Write the final form. Repeatable: "not modified" is success."""
        ...

    async def recover(self, handle: Handle) -> Handle:
        """Bring a handle left by a crash back to where `show` and `finish` work."""
        ...

    async def fail(self, handle: Handle, body: Body) -> None:
        """End the handle visibly, with a sentence that says why."""
        ...


@runtime_checkable
class SupportsChoose(Protocol):
    """An sink whose platform shows buttons."""

    async def choose(self, to: Address, label: str) -> None:
        """Below the message whose button was pressed there, show what was chosen in the place of all its buttons.

        Best effort: never raises, and what is lost is nothing but a button too many.
        """
        ...


@runtime_checkable
class SupportsFetch(Protocol):
    """An sink whose platform keeps the files that people send."""

    def fetch(self, attachment: Attachment) -> AsyncIterator[bytes]:
        """The bytes of a file. Raises BadInput for one that is too large, or not there any more."""
        ...


@runtime_checkable
class SupportsOrphans(Protocol):
    """An sink that counts the first messages of which it does not know whether they are there."""

    orphans: int
