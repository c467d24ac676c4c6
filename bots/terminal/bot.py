"""The terminal as a platform: typed or piped lines in, replies out.

Piped: each line of standard input is one message, each reply is printed as plain text, and the program ends with the
input once everything is answered. Interactive: bots.terminal.screen edits lines and renders replies.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shlex
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from bots.shared.render import printable
from core.commands.parser import is_command
from core.config.keys import Language, key
from core.config.loader import read_table
from core.errors import AppError, Overloaded, StorageError
from core.i18n.messages import duration, say
from core.platform import BotService
from core.types import Address, Attachment, Body, Handle, Incoming, Kind, Lane, Receipt

if TYPE_CHECKING:
    from bots.terminal.screen import Screen

ACCOUNT = "home"
_MAX_OPEN = 16  # piped lines that may wait for their answer
_MAX_LINE_BYTES = 1_000_000  # the rest of a longer line is not kept: it is refused anyway
_CHUNK_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class TerminalSettings:
    """The table [bots.terminal]."""

    place: str = key("home", "place of the binding")
    conversation: str = key("home", "name of the conversation")
    user: str = key("local", "name of the person")
    language: Language = key("", "language of commands and notices; empty is that of the environment")


@dataclass(frozen=True, slots=True)
class TerminalContext:
    """What the program knows about its terminal: the environment's language, the greeting, the history file."""

    language: str = "en"
    greeting: tuple[str, ...] = ()
    history: Path | None = None


class ReplyView(Protocol):
    """Where replies are written. `number` counts the handles of this run."""

    async def begin(self, number: int, reply_to: str, *, resumed: bool) -> None: ...

    async def show(self, number: int, text: str) -> None: ...

    async def end(self, number: int, body: Body) -> None: ...


class TerminalSink:
    """The terminal's message sink. A handle is good for one run of the program; an earlier run's is replaced."""

    def __init__(self, view: ReplyView) -> None:
        self._view = view
        self._run = uuid.uuid4().hex
        self._count = 0
        self._finished: set[int] = set()
        self._replaced: dict[Handle, Handle] = {}

    def split(self, body: Body) -> tuple[Body, ...]:
        return (body,)

    async def open(self, to: Address) -> Handle:
        return await self._begin(to.reply_to, resumed=False)

    async def show(self, handle: Handle, text: str) -> None:
        number = self._number(handle)
        if number and number not in self._finished:
            await self._view.show(number, text)

    async def finish(self, handle: Handle, body: Body) -> Receipt:
        number = self._number(await self.recover(handle))
        if number not in self._finished:
            await self._view.end(number, body)
            self._finished.add(number)
        return Receipt(handle)

    async def recover(self, handle: Handle) -> Handle:
        """The same handle, or a new one for a reply that an earlier run did not finish."""
        if self._number(handle):
            return handle
        if handle not in self._replaced:
            self._replaced[handle] = await self._begin(str(json.loads(handle).get("to", "")), resumed=True)
        return self._replaced[handle]

    async def fail(self, handle: Handle, body: Body) -> None:
        await self.finish(handle, body)

    async def _begin(self, reply_to: str, *, resumed: bool) -> Handle:
        self._count += 1
        number = self._count
        await self._view.begin(number, reply_to, resumed=resumed)
        return Handle(json.dumps({"run": self._run, "n": number, "to": reply_to}))

    def _number(self, handle: Handle) -> int:
        """The number of a handle of this run; else 0."""
        given = json.loads(handle)
        return int(given["n"]) if given["run"] == self._run else 0


class TerminalBot:
    """The terminal bot. `interactive` None: where standard input and output are a terminal."""

    platform = "terminal"
    training_allowed = True

    def __init__(
        self,
        settings: TerminalSettings | None = None,
        context: TerminalContext | None = None,
        *,
        interactive: bool | None = None,
    ) -> None:
        self._settings = settings or TerminalSettings()
        self._context = context or TerminalContext()
        self._language = self._settings.language or self._context.language
        self._shown_language = self._language  # the person's own choice, once it is known
        self._interactive = is_interactive() if interactive is None else interactive

    @classmethod
    def configure(cls, settings: Mapping[str, object]) -> Self:
        return cls(read_settings(settings))

    async def run(self, service: BotService) -> None:
        if self._interactive:
            await self._talk(service)
        else:
            await self._answer_lines(service)

    # --- interactive ---

    async def _talk(self, service: BotService) -> None:
        from bots.terminal.screen import Screen  # prompt_toolkit and rich are for people only

        screen = Screen(
            language=lambda: self._shown_language,
            new_key=_new_key,
            history=self._context.history,
            greeting=self._context.greeting,
        )
        service.register(self.platform, ACCOUNT, TerminalSink(screen))
        await self._read_language(service)
        accepted = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(screen.run(), name="screen")
            sweeper = tasks.create_task(self._sweep(service, screen, accepted), name="sweeper")
            while (typed := await screen.typed.get()) is not None:
                try:
                    await service.accept(await self._incoming(typed.key, typed.text))
                    accepted.set()
                except AppError as error:
                    screen.answered([typed.key])
                    screen.notice(self._sentence(error))
            sweeper.cancel()

    async def _sweep(self, service: BotService, screen: Screen, accepted: asyncio.Event) -> None:
        """Once the service has settled everything: release messages that got no reply, and re-read the language."""
        while True:
            await accepted.wait()
            accepted.clear()
            keys = screen.unanswered
            await service.settled(self.platform, ACCOUNT)
            screen.answered(keys)
            await self._read_language(service)

    async def _read_language(self, service: BotService) -> None:
        """Use the language that the person chose with /language for completion and notices."""
        at = Address(self.platform, ACCOUNT, self._settings.place, self._settings.conversation)
        self._shown_language = await service.places.language(at, self._settings.user) or self._language

    # --- piped ---

    async def _answer_lines(self, service: BotService) -> None:
        view = _PipedView()
        service.register(self.platform, ACCOUNT, TerminalSink(view))
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self._ask_lines(service, view), name="asking")
            gone = tasks.create_task(view.gone.wait(), name="gone")
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            asking.cancel()
            gone.cancel()
        if view.gone.is_set():
            raise BrokenPipeError(errno.EPIPE, "standard output is closed")

    async def _ask_lines(self, service: BotService, view: _PipedView) -> None:
        async for line in _lines(0):
            text = line.decode("utf-8", "replace").strip()
            if not text:
                continue
            if len(view.unanswered) >= _MAX_OPEN:
                await self._wait_for_slot(service, view)
            key = _new_key()
            view.unanswered.add(key)
            await self._accept(service, await self._incoming(key, text))
        await service.settled(self.platform, ACCOUNT)

    async def _wait_for_slot(self, service: BotService, view: _PipedView) -> None:
        """Wait until one more is answered, or all are settled: a message may end without a reply of its own."""
        view.answered.clear()
        answered = asyncio.ensure_future(view.answered.wait())
        settled = asyncio.ensure_future(service.settled(self.platform, ACCOUNT))
        try:
            await asyncio.wait({answered, settled}, return_when=asyncio.FIRST_COMPLETED)
            if settled.done():
                settled.result()
                view.unanswered.clear()
        finally:
            answered.cancel()
            settled.cancel()

    async def _accept(self, service: BotService, incoming: Incoming) -> None:
        while True:
            try:
                return await service.accept(incoming)
            except Overloaded as busy:
                await asyncio.sleep(busy.retry_after_s)

    # --- both ---

    async def _incoming(self, key: str, text: str | None) -> Incoming:
        """A message, or (text None) a stop of the current reply."""
        settings = self._settings
        command = text is not None and is_command(text)
        return Incoming(
            lane=Lane.TURN if text is not None else Lane.CONTROL,
            kind=Kind.MESSAGE if text is not None else Kind.STOP,
            address=Address(self.platform, ACCOUNT, settings.place, settings.conversation, key),
            user=settings.user,
            update_key=key,
            message_key=key,
            text=text or "",
            language=self._language,
            attachments=await asyncio.to_thread(_named_files, text or "") if command else (),
        )

    def _sentence(self, error: AppError) -> str:
        fields = dict(error.fields)
        if isinstance(error, Overloaded):
            fields["wait"] = duration(self._shown_language, error.retry_after_s)
        return say(self._shown_language, error.key, **fields)


class _PipedView:
    """Replies on standard output as plain text, one after another."""

    def __init__(self) -> None:
        self.unanswered: set[str] = set()
        self.answered = asyncio.Event()
        self.gone = asyncio.Event()
        self._keys: dict[int, str] = {}

    async def begin(self, number: int, reply_to: str, *, resumed: bool) -> None:
        self._keys[number] = reply_to

    async def show(self, number: int, text: str) -> None:
        pass

    async def end(self, number: int, body: Body) -> None:
        lines = [body.text.strip(), *(str(path) for path in body.files)]
        try:
            await asyncio.to_thread(_write_all, 1, (printable("\n".join(lines)) + "\n").encode("utf-8"))
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EBADF):
                raise StorageError(detail=f"standard output cannot be written: {error.strerror}") from error
            self.gone.set()
            await asyncio.Event().wait()  # never written in this run: the next start delivers it
        self.unanswered.discard(self._keys.pop(number, ""))
        self.answered.set()


def read_settings(given: Mapping[str, object]) -> TerminalSettings:
    """Raises BadConfig naming every key that is unknown or wrong."""
    return read_table(TerminalSettings, "bots.terminal", given)


def is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _new_key() -> str:
    return uuid.uuid4().hex


def _named_files(command: str) -> tuple[Attachment, ...]:
    """The local files among the words of a command."""
    try:
        words = shlex.split(command)[1:]
    except ValueError:
        words = command.split()[1:]
    paths = [Path(word).expanduser() for word in words]
    return tuple(Attachment(str(path.resolve()), path.name, path.stat().st_size) for path in paths if _is_file(path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


async def _lines(descriptor: int) -> AsyncIterator[bytes]:
    """The lines of a descriptor, each at most _MAX_LINE_BYTES long, read no faster than they are taken."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    slots = threading.Semaphore(_MAX_OPEN)

    def put(line: bytes | None) -> None:
        slots.acquire()
        loop.call_soon_threadsafe(queue.put_nowait, line)

    # A daemon thread without a Python lock: it may be waiting for input when the program ends.
    threading.Thread(target=_read_lines, args=(descriptor, put), name="stdin", daemon=True).start()
    while (line := await queue.get()) is not None:
        slots.release()
        yield line


def _read_lines(descriptor: int, put: Callable[[bytes | None], None]) -> None:
    held = b""
    with suppress(OSError, RuntimeError):  # input closed, or the loop is closed
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            *whole, held = (held + chunk).split(b"\n")
            for line in whole:
                put(line[:_MAX_LINE_BYTES])
            held = held[:_MAX_LINE_BYTES]
        if held:
            put(held)
    with suppress(RuntimeError):
        put(None)
