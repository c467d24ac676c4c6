"""The interactive terminal: a line editor at the bottom, streamed replies above it.

The editor runs for the whole session, so the terminal stays in raw mode: Ctrl-C is a key that stops a reply, never a
signal that ends this program or the `make` above it. Complete Markdown blocks are printed once; only the last,
incomplete one is redrawn. What is typed comes out of a queue.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import ClassVar

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import ANSI, FormattedText, StyleAndTextTuples, to_formatted_text
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.styles import Style
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

from bots.shared.render import closed_blocks, plain, printable
from core.commands.table import COMMANDS
from core.i18n.messages import say
from core.types import Body

PROMPT = "› "
_REDRAW_S = 0.05
_STYLE = Style.from_dict({"dim": "ansibrightblack", "bottom-toolbar": "noreverse ansibrightblack"})


@dataclass(frozen=True, slots=True)
class Typed:
    """A message that was sent, or (text None) a request to stop the reply."""

    key: str
    text: str | None


@dataclass(slots=True)
class _OpenReply:
    """One open handle. The first `printed` characters of `text` are printed and stay."""

    key: str
    text: str = ""
    printed: int = 0


class Screen:
    """The reply view of a terminal. `language` is asked at each use: a command may change it."""

    def __init__(
        self,
        *,
        language: Callable[[], str],
        new_key: Callable[[], str],
        history: Path | None,
        greeting: Iterable[str] = (),
    ) -> None:
        self.typed: asyncio.Queue[Typed | None] = asyncio.Queue()
        self._language = language
        self._new_key = new_key
        self._greeting = tuple(greeting)
        self._replies: dict[int, _OpenReply] = {}
        self._unanswered: dict[str, str] = {}  # by key: the text that waits to be printed, or "" once it is
        self._tail: tuple[tuple[str, int], list[str]] = (("", 0), [])
        self._session: PromptSession[None] = PromptSession(
            self._above,
            multiline=True,
            prompt_continuation="  ",
            completer=_Commands(language),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            reserve_space_for_menu=6,
            key_bindings=self._keys(),
            history=open_history(history) if history else InMemoryHistory(),
            style=_STYLE,
            erase_when_done=True,
        )
        self._redraw_due = False

    @property
    def _app(self) -> Application[None]:
        return self._session.app

    @property
    def _width(self) -> int:
        return max(20, self._app.output.get_size().columns)

    async def run(self) -> None:
        """Edit lines until Ctrl-D, or until the terminal is gone. `typed` then ends with None."""
        self._print([*(part for line in self._greeting for part in _wrapped(line, self._width)), ""])
        try:
            with patch_stdout(raw=True):
                await self._session.prompt_async(handle_sigint=False, set_exception_handler=False)
        except EOFError:
            pass
        finally:
            self.typed.put_nowait(None)

    # --- the reply view ---

    async def begin(self, number: int, reply_to: str, *, resumed: bool) -> None:
        self._echo_until(reply_to)
        if resumed:
            self._print([_dim(say(self._language(), "terminal.owed"))])
        self._replies[number] = _OpenReply(reply_to)
        self._app.invalidate()

    async def show(self, number: int, text: str) -> None:
        reply = self._replies.get(number)
        if reply is None:
            return
        reply.text = printable(text).lstrip()
        if reply.key:
            closed, _ = closed_blocks(reply.text[reply.printed :])
            if closed:
                self._print_block(reply, closed)
                reply.printed += len(closed)
        else:
            self._session.bottom_toolbar = FormattedText([("class:dim", plain(reply.text))])
        if not self._redraw_due:
            self._redraw_due = True
            asyncio.get_running_loop().call_later(_REDRAW_S, self._redraw)

    def _redraw(self) -> None:
        self._redraw_due = False
        self._app.invalidate()

    async def end(self, number: int, body: Body) -> None:
        reply = self._replies.pop(number, None) or _OpenReply("")
        text = printable(body.text)
        if not text.startswith(reply.text[: reply.printed]):  # not the text that was streamed
            reply.printed = 0
        self._print_block(reply, text[reply.printed :])
        hints = [_dim(hint) for hint in body_hints(body)]
        note = " " * (self._width - cell_len(body.note)) + body.note
        self._print([*hints, *([_dim(note)] if body.note else [])])
        self._unanswered.pop(reply.key, None)
        if not reply.key:
            self._session.bottom_toolbar = None
        self._app.invalidate()

    def answered(self, keys: Iterable[str]) -> None:
        """Release messages that got no reply of their own (a stop, a repeated refusal)."""
        for key in keys:
            self._echo(self._unanswered.pop(key, ""))
        self._app.invalidate()

    @property
    def unanswered(self) -> tuple[str, ...]:
        return tuple(self._unanswered)

    def notice(self, text: str) -> None:
        """Print a notice above the line that is being typed."""
        self._print([_dim(printable(line)) for line in text.splitlines()])

    # --- printing ---

    def _echo_until(self, key: str) -> None:
        """Print the queued messages up to the one that is answered now."""
        if key not in self._unanswered:
            return
        for earlier in list(self._unanswered):
            self._echo(self._unanswered[earlier])
            self._unanswered[earlier] = ""
            if earlier == key:
                return
            del self._unanswered[earlier]

    def _echo(self, text: str) -> None:
        if text:
            first, *more = printable(text).split("\n")
            self._print([f"{PROMPT}{first}", *(f"  {line}" for line in more)])

    def _print_block(self, reply: _OpenReply, markdown: str) -> None:
        lines = markdown_lines(markdown, self._width)
        self._print([*([""] if reply.printed and lines else []), *lines])

    def _print(self, lines: Iterable[str]) -> None:
        """Write above the editor without leaving raw mode, as run_in_terminal would."""
        data = "".join(f"{line}\r\n" for line in lines)
        if not data:
            return
        if self._app.is_running:
            self._app.renderer.erase()
            self._app.output.write_raw(data)
            self._app.output.flush()
            self._app.renderer.request_absolute_cursor_position()
            self._app.invalidate()
        else:
            self._app.output.write_raw(data)
            self._app.output.flush()

    # --- between the printed text and the cursor ---

    def _above(self) -> StyleAndTextTuples:
        """The incomplete block, the queued messages, the prompt."""
        shown: StyleAndTextTuples = []
        for reply in self._replies.values():
            if reply.key:
                shown += self._streaming(reply)
        for text in self._unanswered.values():
            if text:
                first = set_cell_size(printable(text).split("\n")[0], self._width - 4).rstrip()
                shown.append(("class:dim", f"{PROMPT}{first}\n"))
        return [*shown, ("", PROMPT)]

    def _streaming(self, reply: _OpenReply) -> StyleAndTextTuples:
        tail = reply.text[reply.printed :]
        if not tail.strip():
            return [("class:dim", "…\n")]
        if self._tail[0] != (tail, self._width):
            self._tail = ((tail, self._width), markdown_lines(tail, self._width))
        height = max(3, self._app.output.get_size().rows - 6)
        lines = ([""] if reply.printed else []) + self._tail[1]
        return [*to_formatted_text(ANSI("\n".join(lines[-height:]))), ("", "\n")]

    # --- keys ---

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            text = buffer.text.strip()
            if text:
                buffer.append_to_history()
                self._send(text)
            buffer.reset()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            elif not self._stop_reply():
                self.notice(say(self._language(), "terminal.leave_hint"))

        @keys.add("c-d", filter=Condition(lambda: not self._session.default_buffer.text))
        def _(event: KeyPressEvent) -> None:
            self._stop_reply()
            event.app.exit()

        return keys

    def _stop_reply(self) -> bool:
        """Request a stop of the current reply; whether there is one."""
        busy = bool(self._unanswered) or any(reply.key for reply in self._replies.values())
        if busy:
            self.typed.put_nowait(Typed(self._new_key(), None))
        return busy

    def _send(self, text: str) -> None:
        key = self._new_key()
        if self._unanswered:
            self._unanswered[key] = text
        else:
            self._echo(text)
            self._unanswered[key] = ""
        self.typed.put_nowait(Typed(key, text))


class _Commands(Completer):
    """Completes the name of a command while the first word is being typed."""

    def __init__(self, language: Callable[[], str]) -> None:
        self._language = language

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/") and " " not in typed and "\n" not in typed:
            for command in COMMANDS:
                if command.name.startswith(typed[1:]):
                    meaning = command.help(self._language())
                    yield Completion(f"/{command.name}", start_position=-len(typed), display_meta=meaning)


def open_history(path: Path) -> History:
    """The history of typed lines, readable by this user only."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.chmod(0o600)
    return FileHistory(path)


def body_hints(body: Body) -> list[str]:
    """Lines below a reply: files, and the commands behind its buttons, except those of a model's answer."""
    commands = [
        f"[{button.text}] {button.value}" for button in body.buttons if button.action == "command" and not body.note
    ]
    return [*(str(path) for path in body.files), *commands]


# --- Markdown to lines ---


class _LeftHeading(Heading):
    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = {}


class _Code(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2))


class _ChatMarkdown(Markdown):
    """Markdown as chats write it: a line break is kept, and headings are aligned left."""

    elements: ClassVar = {**Markdown.elements, "heading_open": _LeftHeading, "fence": _Code, "code_block": _Code}

    def __init__(self, text: str) -> None:
        super().__init__(text, code_theme="ansi_dark", hyperlinks=False)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def markdown_lines(text: str, width: int) -> list[str]:
    """Markdown as lines with ANSI styles: no blank line at either end, no spaces at the end of a line."""
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system="standard", highlight=False)
    lines = [_ansi(console, line) for line in Segment.split_lines(console.render(_ChatMarkdown(text)))]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _ansi(console: Console, line: list[Segment]) -> str:
    text = Text.assemble(*((segment.text, segment.style or "") for segment in line if not segment.control))
    text.rstrip()
    if not text.plain:
        return ""
    with console.capture() as capture:
        console.print(text, end="", soft_wrap=True)
    return capture.get()


def _wrapped(text: str, width: int) -> list[str]:
    return [line.plain for line in Text(text).wrap(Console(width=width), width)]


def _dim(text: str) -> str:
    return f"\x1b[90m{text}\x1b[0m"
