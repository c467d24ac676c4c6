"""The terminal as a platform: typed or piped lines come in, replies go out. Knows nothing of models or rows.

Piped, each line of standard input is one message, each reply is printed as plain text, and the end of input ends the
program once all is answered. At a terminal, bots.terminal.screen is in charge of what people see.
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
class Surroundings:
    """What the program knows of the terminal that it runs on."""

    language: str = "en"
    greeting: tuple[str, ...] = ()
    history: Path | None = None
    commands: Mapping[str, str] | None = None


class Sheet(Protocol):
    """What replies are written on. `number` counts the handles of this run."""

    async def begin(self, number: int, reply_to: str, *, owed: bool) -> None: ...

    async def show(self, number: int, text: str) -> None: ...

    async def end(self, number: int, body: Body) -> None: ...


class TerminalSink:
    """Handles count within one run of the program; a handle of an earlier run is opened anew."""

    def __init__(self, sheet: Sheet) -> None:
        self._sheet = sheet
        self._run = uuid.uuid4().hex
        self._count = 0
        self._ended: set[int] = set()
        self._renewed: dict[Handle, Handle] = {}

    def split(self, body: Body) -> tuple[Body, ...]:
        return (body,)

    async def open(self, to: Address) -> Handle:
        return await self._begin(to.reply_to, owed=False)

    async def show(self, handle: Handle, text: str) -> None:
        number = self._number(handle)
        if number and number not in self._ended:
            await self._sheet.show(number, text)

    async def finish(self, handle: Handle, body: Body) -> Receipt:
        number = self._number(await self.recover(handle))
        if number not in self._ended:
            await self._sheet.end(number, body)
            self._ended.add(number)
        return Receipt(handle)

    async def recover(self, handle: Handle) -> Handle:
        """The same handle, or a new one for what an earlier run still owed."""
        if self._number(handle):
            return handle
        if handle not in self._renewed:
            self._renewed[handle] = await self._begin(str(json.loads(handle).get("to", "")), owed=True)
        return self._renewed[handle]

    async def fail(self, handle: Handle, body: Body) -> None:
        await self.finish(handle, body)

    async def _begin(self, reply_to: str, *, owed: bool) -> Handle:
        self._count += 1
        number = self._count
        await self._sheet.begin(number, reply_to, owed=owed)
        return Handle(json.dumps({"run": self._run, "n": number, "to": reply_to}))

    def _number(self, handle: Handle) -> int:
        """The number of a handle of this run; else 0."""
        given = json.loads(handle)
        return int(given["n"]) if given["run"] == self._run else 0


class TerminalBot:
    """`interactive` None means: if standard input and output are a terminal."""

    platform = "terminal"
    training_allowed = True

    def __init__(
        self,
        settings: TerminalSettings | None = None,
        surroundings: Surroundings | None = None,
        *,
        interactive: bool | None = None,
    ) -> None:
        self._settings = settings or TerminalSettings()
        self._surroundings = surroundings or Surroundings()
        self._language = self._settings.language or self._surroundings.language
        self._interactive = is_interactive() if interactive is None else interactive

    @classmethod
    def configure(cls, settings: Mapping[str, object]) -> Self:
        return cls(read_settings(settings))

    async def run(self, door: BotService) -> None:
        if self._interactive:
            await self._talk(door)
        else:
            await self._answer_lines(door)

    # --- a person ---

    async def _talk(self, door: BotService) -> None:
        from bots.terminal.screen import Screen  # prompt_toolkit and rich are for people only

        screen = Screen(
            words=lambda key: say(self._language, key),
            new_key=_new_key,
            commands=self._surroundings.commands or {},
            history=self._surroundings.history,
            greeting=self._surroundings.greeting,
        )
        door.register(self.platform, ACCOUNT, TerminalSink(screen))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(screen.run(), name="screen")
            sweeper = tasks.create_task(self._sweep(door, screen), name="sweeper")
            while (typed := await screen.typed.get()) is not None:
                try:
                    await door.accept(await self._incoming(typed.key, typed.text))
                except AppError as error:
                    screen.answered([typed.key])
                    screen.notice(self._sentence(error))
            sweeper.cancel()

    async def _sweep(self, door: BotService, screen: Screen) -> None:
        """A message may end without a reply of its own: what the service has settled waits for nothing."""
        while True:
            keys = screen.unanswered
            if keys:
                await door.settled(self.platform, ACCOUNT)
                screen.answered(keys)
            await asyncio.sleep(0.5)

    # --- a pipe ---

    async def _answer_lines(self, door: BotService) -> None:
        sheet = _Paper()
        door.register(self.platform, ACCOUNT, TerminalSink(sheet))
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(self._ask_lines(door, sheet), name="asking")
            gone = tasks.create_task(sheet.gone.wait(), name="gone")
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            asking.cancel()
            gone.cancel()
        if sheet.gone.is_set():
            raise BrokenPipeError(errno.EPIPE, "standard output is closed")

    async def _ask_lines(self, door: BotService, sheet: _Paper) -> None:
        async for line in _lines(0):
            text = line.decode("utf-8", "replace").strip()
            if not text:
                continue
            if len(sheet.unanswered) >= _MAX_OPEN:
                await self._wait_for_room(door, sheet)
            key = _new_key()
            sheet.unanswered.add(key)
            await self._accept(door, await self._incoming(key, text))
        await door.settled(self.platform, ACCOUNT)

    async def _wait_for_room(self, door: BotService, sheet: _Paper) -> None:
        """Until one more is answered, or all are settled: a message may end without a reply of its own."""
        sheet.answered.clear()
        answered = asyncio.ensure_future(sheet.answered.wait())
        settled = asyncio.ensure_future(door.settled(self.platform, ACCOUNT))
        try:
            await asyncio.wait({answered, settled}, return_when=asyncio.FIRST_COMPLETED)
            if settled.done():
                settled.result()
                sheet.unanswered.clear()
        finally:
            answered.cancel()
            settled.cancel()

    async def _accept(self, door: BotService, incoming: Incoming) -> None:
        while True:
            try:
                return await door.accept(incoming)
            except Overloaded as busy:
                await asyncio.sleep(busy.retry_after_s)

    # --- both ---

    async def _incoming(self, key: str, text: str | None) -> Incoming:
        """A message, or (text None) the wish to stop the reply."""
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
            fields["wait"] = duration(self._language, error.retry_after_s)
        return say(self._language, error.key, **fields)


class _Paper:
    """A sheet on standard output, for programs: replies as plain text, one after another, nothing else."""

    def __init__(self) -> None:
        self.unanswered: set[str] = set()
        self.answered = asyncio.Event()
        self.gone = asyncio.Event()
        self._keys: dict[int, str] = {}

    async def begin(self, number: int, reply_to: str, *, owed: bool) -> None:
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
            await asyncio.Event().wait()  # not written, and never will be: the next start owes it
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
    """The local files that a command names."""
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
    room = threading.Semaphore(_MAX_OPEN)

    def give(line: bytes | None) -> None:
        room.acquire()
        loop.call_soon_threadsafe(queue.put_nowait, line)

    # A daemon thread that holds no lock of Python's: it may be waiting for input when the program ends.
    threading.Thread(target=_read_lines, args=(descriptor, give), name="stdin", daemon=True).start()
    while (line := await queue.get()) is not None:
        room.release()
        yield line


def _read_lines(descriptor: int, give: Callable[[bytes | None], None]) -> None:
    held = b""
    with suppress(OSError, RuntimeError):  # input is gone, or the loop is closed
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            *whole, held = (held + chunk).split(b"\n")
            for line in whole:
                give(line[:_MAX_LINE_BYTES])
            held = held[:_MAX_LINE_BYTES]
        if held:
            give(held)
    with suppress(RuntimeError):
        give(None)
