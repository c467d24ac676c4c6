"""The control socket: other `distributary` commands have the process that owns the home write for them.

A request and its answer are one line of JSON each: {"command": "/adapter list", "channel": "acme"}, {"apply": {...}} or
{"probe": true} -> {"text": ...} or {"error": ...}. The progress of a job is not sent: `finetune status` shows it. The
socket lies in the home with mode 0600; whoever can open it acts as the terminal's owner.
"""

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bots.provisioning import apply, owner, preview
from core.channels.terminal import TERMINAL
from core.chat.dispatch import dispatch
from core.commands.parser import parse
from core.commands.registry import CommandContext
from core.config.loader import read_config
from core.engine.protocol import Engine
from core.errors import AppError, BadConfig, BadInput, StorageError
from core.i18n.messages import say
from core.jobs.supervisor import JobSupervisor
from core.privacy.retention import try_sweep
from core.storage import state
from core.storage.database import Database
from core.storage.home import Home
from core.types import Address, After, Attachment, Body, Effect, ForgetMemory, Handle, Receipt

log = logging.getLogger(__name__)
_MAX_REQUEST_BYTES = 4_000_000
_ANSWER_S = 600.0  # a large adapter is unpacked meanwhile
_NEEDS_A_CHAT = (("adapter", "compare"), ("adapter", "choose"))


@dataclass(frozen=True, slots=True)
class CommandRunner:
    """Runs chat commands as the terminal's owner. `engine` and `training` are None outside `serve` and `chat`."""

    database: Database
    home: Home
    engine: Engine | None = None
    training: JobSupervisor | None = None

    async def run(self, text: str, channel: str = TERMINAL) -> Body:
        """Run one chat command in a channel. Raises what the command raises."""
        call = parse(text)
        if call.key in _NEEDS_A_CHAT:
            raise BadInput("terminal.needs_a_chat", command=f"/{call.command.name} {call.form.word}")
        caller = await self.database.write(lambda tx: owner(tx, channel))
        outcome = await dispatch(CommandContext(self.home, self.database, _no_file), caller, call)
        for after in outcome.after:
            await self._follow(after)
        if self.training is None and Effect.WAKE_TRAINING in outcome.after:
            return replace(outcome.body, text=f"{outcome.body.text}\n{say(caller.language, 'terminal.later')}")
        return outcome.body

    async def apply(self, given: Mapping[str, Any], *, only_preview: bool = False) -> str:
        """Change the database to what the given [partners.*] and [channels.*] set, or tell what that would change."""
        config = read_config(given, os.environ)
        if only_preview:
            return await self.database.read(lambda tx: preview(tx, config))
        return await self.database.write(lambda tx: apply(tx, config))

    async def _follow(self, after: After) -> None:
        match after:
            case ForgetMemory(channel, conversation) if self.engine is not None:
                await self.engine.forget(channel, conversation)
            case Effect.WAKE_TRAINING if self.training is not None:
                self.training.wake()
            case Effect.ERASE_FILES:
                await try_sweep(self.database, self.home)


def _no_file(to: Address, attachment: Attachment) -> AsyncIterator[bytes]:
    """The command line has no attachments: files are named by path."""
    raise BadInput("training.no_files_here")


class NullSink:
    """The sink of the command line, which shows no messages of jobs."""

    def split(self, body: Body) -> tuple[Body, ...]:
        return (body,)

    async def open(self, to: Address) -> Handle:
        return Handle(to.place)

    async def show(self, handle: Handle, text: str) -> None:
        pass

    async def finish(self, handle: Handle, body: Body) -> Receipt:
        return Receipt(handle)

    async def recover(self, handle: Handle) -> Handle:
        return handle

    async def fail(self, handle: Handle, body: Body) -> None:
        pass


async def serve(runner: CommandRunner) -> None:
    """Answer on the socket until cancelled."""
    path = runner.home.control_socket
    path.unlink(missing_ok=True)
    with _short(path) as short:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(short)
        finally:
            os.umask(before)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError, TimeoutError):  # the client went away, or sent no JSON
            async with asyncio.timeout(_ANSWER_S):
                given = json.loads(await reader.readline())
                writer.write(json.dumps(await _answer(runner, given), ensure_ascii=False).encode() + b"\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, sock=listener, limit=_MAX_REQUEST_BYTES)
    try:
        async with server:
            await server.serve_forever()
    finally:
        path.unlink(missing_ok=True)


async def _answer(runner: CommandRunner, given: Any) -> dict[str, str]:
    try:
        if "probe" in given:
            await runner.database.write(state.probe)
            return {"text": "ready"}
        if "apply" in given:
            return {"text": await runner.apply(given["apply"], only_preview=bool(given.get("preview")))}
        return {"text": (await runner.run(str(given["command"]), str(given.get("channel", TERMINAL)))).text}
    except AppError as error:
        return {"error": sentence(error)}
    except Exception as error:
        log.exception("control.failed")
        return {"error": f"{say('en', 'error.internal')} ({type(error).__name__})"}


def sentence(error: AppError) -> str:
    """The error for the command line: its message, and its detail if that adds something."""
    if isinstance(error, BadConfig) and error.detail:  # names file, keys, values and what is allowed
        return error.detail
    shown = say("en", error.key, **error.fields)
    return f"{shown}\n{error.detail}" if error.detail and error.detail not in shown else shown


def ask(home: Home, request: Mapping[str, Any]) -> dict[str, str] | None:
    """The answer of the process that owns the home; None if no process listens. Raises StorageError."""
    with _short(home.control_socket) as short, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_S)
        try:
            connection.connect(short)
        except OSError:
            return None
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as answer:
                return {str(key): str(value) for key, value in json.loads(answer.readline()).items()}
        except (OSError, ValueError) as error:
            raise StorageError(detail=f"the process that owns {home.path} did not answer: {error}") from error


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A path of the socket within the 107 bytes that the system allows."""
    if len(os.fsencode(path)) < 104:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
