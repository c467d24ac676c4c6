"""The contract of a bot: the bot itself, the service that it talks to, and the sink that writes replies for it.

A bot is a class named by an entry point of the group `distributary.bots` (bots/plugins.py finds it). It turns the
updates of one platform into `Incoming` and registers a `MessageSink` for each account. A sink may also implement
`SupportsFetch` (files), `SupportsChoose` (buttons) and `SupportsOrphans` (a metric).
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from core.errors import AppError
from core.types import Address, Attachment, Body, Channel, Grant, Handle, Incoming, Receipt


class Unreachable(AppError):
    """The recipient can no longer be reached; retrying is useless."""

    key = "error.unreachable"


# --- writing ---


@dataclass(frozen=True, slots=True)
class Reopened:
    """`finish` or `fail` had to open another message; the caller commits `handle` and calls again with it."""

    handle: Handle


class MessageSink(Protocol):
    """Writes the parts of a delivery. Repeating any method but `open` produces no second message.

    The caller commits a handle before it writes anything final through it, and a receipt afterwards. An exception from
    `open`, `finish`, `recover` or `fail` means "outcome unknown": the caller recovers the handle and repeats.
    """

    def split(self, body: Body) -> tuple[Body, ...]:
        """Cut a final body into parts within the platform's limits; their joined texts are the text. Pure."""

    async def open(self, to: Address) -> Handle:
        """Post the first small message, or open a stream. After a lost response it posts once more at most."""

    async def show(self, handle: Handle, text: str) -> None:
        """Show the text so far: best effort, at the platform's rate; a slow or absent platform raises nothing."""

    async def finish(self, handle: Handle, body: Body) -> Receipt | Reopened:
        """Write the final form; "not modified" is success. `Reopened` where this handle cannot hold a final text."""

    async def recover(self, handle: Handle) -> Handle:
        """Make a committed handle usable for `show` and `finish` again, in this process or after a restart."""

    async def fail(self, handle: Handle, body: Body) -> Reopened | None:
        """End the handle visibly with the reason. `Reopened` as for `finish`."""


@runtime_checkable
class SupportsChoose(Protocol):
    """A sink whose platform shows buttons."""

    async def choose(self, to: Address, label: str) -> None:
        """Replace the buttons of the message that `to` replies to by the chosen label. Best effort; never raises."""


@runtime_checkable
class SupportsFetch(Protocol):
    """A sink whose platform stores the files that people send."""

    def fetch(self, attachment: Attachment) -> AsyncIterator[bytes]:
        """The content of a file. Raises BadInput for one that is too large or no longer there."""


@runtime_checkable
class SupportsOrphans(Protocol):
    """A sink that counts first messages whose outcome is unknown."""

    orphans: int


# --- the service as a bot sees it ---

VOTE_REASONS = ("untrue", "unhelpful", "other")  # of a thumb down, the third part of its button's value


@dataclass(frozen=True, slots=True)
class Choice:
    """A version that could be promoted. One that has not passed its evaluation needs a reason."""

    label: str
    passed: bool = True


@dataclass(frozen=True, slots=True)
class JobLine:
    """One fine-tune in a list. `lasting`: it can be resumed after it was cancelled."""

    id: int
    label: str
    dataset: str
    state: str
    lasting: bool
    age_s: float


@dataclass(frozen=True, slots=True)
class Overview:
    """One channel as one person may see it. `days`, `jobs` and `choices` are empty without a grant for the channel.

    `left_hour` is the number of questions left in this hour, None without a limit. `version` has been the champion for
    `age_s` seconds, None where nothing was ever promoted. `days` are (YYYY-MM-DD, replies), oldest first; `jobs` and
    `choices` are newest first.
    """

    channel: Channel
    grant: Grant
    language: str
    left_hour: int | None
    version: str
    age_s: float | None
    days: tuple[tuple[str, int], ...] = ()
    jobs: tuple[JobLine, ...] = ()
    choices: tuple[Choice, ...] = ()


class PlaceReader(Protocol):
    """What a bot's own pages and menus show of a place. It decides nothing: commands are checked where they run."""

    async def overview(self, at: Address, user: str) -> Overview | None:
        """None where no channel is bound to the place."""

    async def language(self, at: Address, user: str) -> str:
        """The language that this person chose, else their channel's; "" where neither is set."""

    async def heard(self, at: Address, message_key: str) -> bool:
        """Whether that message was accepted."""


class InstallationStore(Protocol):
    """Sealed tokens for each account, and the one-time states of an OAuth installation."""

    async def keep(self, platform: str, account: str, kept: Mapping[str, str], link: str | None = None) -> None:
        """Store an account's tokens. `link` binds the account to the channel of that link ("": the default)."""

    async def all(self, platform: str) -> dict[str, dict[str, str]]:
        """The stored tokens by account."""

    async def drop(self, platform: str, account: str) -> None:
        """Delete an account's tokens."""

    async def begin(self, platform: str, link: str) -> str:
        """A state that is valid once, for ten minutes."""

    async def use(self, platform: str, state: str) -> str | None:
        """Use up a state: its link, or None for one that is unknown, used or expired."""


class BotService(Protocol):
    """The service as a bot sees it."""

    @property
    def installations(self) -> InstallationStore: ...

    @property
    def places(self) -> PlaceReader: ...

    def register(self, platform: str, account: str, sink: MessageSink) -> None:
        """Name the sink for an account; before the first `accept` for that account."""

    async def accept(self, *incoming: Incoming) -> None:
        """Commit updates; only then may the bot acknowledge them to its platform. A repeat is a no-op.

        Raises Overloaded, StorageFull or StorageError: nothing was stored, and nothing may be acknowledged.
        """

    async def accept_dead(self, platform: str, account: str, update_key: str, raw: str) -> None:
        """Commit an update that cannot be parsed, so that it can be acknowledged."""

    async def grant(self, at: Address, user: str) -> Grant:
        """The person's grant in the channel of that place, ANYONE without one; commands are checked where they run."""

    async def settled(self, platform: str, account: str) -> None:
        """Return when nothing accepted for this account is still open."""


# --- the bot ---


class Bot(Protocol):
    """One platform. Constructed once for each table [bots.NAME] of the configuration.

    `training_allowed`: whether the platform's terms permit training on what consenting people say there.
    """

    platform: str
    training_allowed: bool

    @classmethod
    def configure(cls, settings: Mapping[str, object]) -> Self:
        """Raises BadConfig with every key that is unknown, missing or invalid, and the allowed ones."""

    async def run(self, service: BotService, /) -> None:
        """Register sinks, then listen until cancelled or until the input ends."""
