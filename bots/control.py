"""The control socket: other `distributary` commands ask the process that owns the home to write for them.

One line of JSON each way: {"command": "/adapter list", "channel": "acme"} or {"apply": {...}} -> {"text": ...} or
{"error": ...}. What a job says while it runs is heard by nobody here: its command `status` tells how far it is.
The socket lies in the home, for its owner's eyes only; who can open it is the terminal's owner. Knows no model.
"""

from __future__ import annotations

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
from core.storage.database import Database
from core.storage.home import Home
from core.types import (
    Address,
    After,
    Attachment,
    Body,
    EraseFiles,
    ForgetMemory,
    Handle,
    Receipt,
    WakeTraining,
)

log = logging.getLogger(__name__)
_MAX_REQUEST_BYTES = 4_000_000
_ANSWER_S = 600.0  # a large adapter is unpacked meanwhile
_NEEDS_A_CHAT = (("adapter", "compare"), ("adapter", "choose"))


@dataclass(frozen=True, slots=True)
class CommandRunner:
    """Runs commands as the terminal's owner. Without `engine` and `training` nothing else runs in this process."""

    database: Database
    home: Home
    engine: Engine | None = None
    training: JobSupervisor | None = None

    async def run(self, text: str, channel: str = TERMINAL) -> Body:
        """Raises what the command raises."""
        call = parse(text)
        if call.key in _NEEDS_A_CHAT:
            raise BadInput("terminal.needs_a_chat", command=f"/{call.command.name} {call.form.word}")
        caller = await self.database.write(lambda tx: owner(tx, channel))
        outcome = await dispatch(CommandContext(self.home, self.database, _no_file), caller, call)
        for after in outcome.after:
            await self._follow(after)
        if self.training is None and WakeTraining() in outcome.after:
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
            case WakeTraining() if self.training is not None:
                self.training.wake()
            case EraseFiles():
                await try_sweep(self.database, self.home)


def _no_file(to: Address, attachment: Attachment) -> AsyncIterator[bytes]:
    """Nothing is sent to a command line: files are named."""
    raise BadInput("training.no_files_here")


class NullSink:
    """The sink of the command line: a job that was ordered there is worked off, and has nobody to tell."""

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


# --- the owner's side ---


async def serve(desk: CommandRunner) -> None:
    """Answer on the socket until cancelled."""
    path = desk.home.control_socket
    path.unlink(missing_ok=True)
    with _short(path) as short:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(short)
        finally:
            os.umask(before)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError, TimeoutError):  # a caller that went away, or speaks no JSON
            async with asyncio.timeout(_ANSWER_S):
                given = json.loads(await reader.readline())
                writer.write(json.dumps(await _answer(desk, given), ensure_ascii=False).encode() + b"\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, sock=listener, limit=_MAX_REQUEST_BYTES)
    try:
        async with server:
            await server.serve_forever()
    finally:
        path.unlink(missing_ok=True)


async def _answer(desk: CommandRunner, given: Any) -> dict[str, str]:
    try:
        if "apply" in given:
            return {"text": await desk.apply(given["apply"], only_preview=bool(given.get("preview")))}
        return {"text": (await desk.run(str(given["command"]), str(given.get("channel", TERMINAL)))).text}
    except AppError as error:
        return {"error": sentence(error)}
    except Exception as error:
        log.exception("control.failed")
        return {"error": f"{say('en', 'error.internal')} ({type(error).__name__})"}


def sentence(error: AppError) -> str:
    """The error as one who sits at the command line reads it: the sentence, and the detail where it says more."""
    if isinstance(error, BadConfig) and error.detail:  # names file, keys, values and what is allowed
        return error.detail
    told = say("en", error.key, **error.fields)
    return f"{told}\n{error.detail}" if error.detail and error.detail not in told else told


# --- the asking side ---


def ask(home: Home, request: Mapping[str, Any]) -> dict[str, str] | None:
    """What the owner of the home answers; None where no owner listens."""
    with _short(home.control_socket) as short, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(_ANSWER_S)
        try:
            line.connect(short)
        except OSError:
            return None
        try:
            line.sendall(json.dumps(request).encode() + b"\n")
            with line.makefile("rb") as answer:
                return {str(key): str(value) for key, value in json.loads(answer.readline()).items()}
        except (OSError, ValueError) as error:
            raise StorageError(detail=f"the process that owns {home.path} did not answer: {error}") from error


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for the socket that fits into the 107 bytes which the system allows."""
    if len(os.fsencode(path)) < 104:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
