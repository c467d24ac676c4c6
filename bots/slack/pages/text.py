"""Markdown for Slack, and Slack's markup as plain text.

Slack takes standard Markdown; an invisible word joiner disarms mentions that would notify people.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from markdown_it import MarkdownIt

from bots.shared.render import split_text
from core.commands.table import COMMANDS

LIMIT = 11_000  # characters of Markdown in one message: Slack refuses blocks above some 13,200
_HEAD = 900  # characters; a longer table head is not repeated
_JOINER = "\u2060"
_ALARM = re.compile(  # not HTML, e-mail addresses or paths
    r"<(?=(?i:!(?!doctype)[a-z])|@[UW][A-Z0-9]|#[CDG][A-Z0-9])"
    r"|(?i:(?<![a-z0-9])(?<![a-z0-9]/)@(?=(?:channel|here|everyone)(?![a-z0-9])))"
)
_OPEN_END = re.compile(r"(?:<(?:![a-zA-Z]{0,7}|@[UW]?|#[CDG]?)?|@[a-zA-Z]{0,8})\Z")
_FENCE = re.compile(r" {0,3}(`{3,20}|~{3,20})[ \t]*([^\s`]{0,40})[^`]*")
_NAME = "\0"  # placeholder of the bot's mention
_NAME_END = re.compile(f"{_NAME}[ ,:]*")
_LINE_END = re.compile(r"\r\n?|\n")  # as the parser counts lines
_SCHEME = re.compile(r"\A(?:https?://|tel:)")
_ENTITY = re.compile(r"<([^<>\n]*)>")
COMMAND = "/distributary"
_COMMANDS = re.compile(rf"(?<![\w/.:@-])/({'|'.join(command.name for command in COMMANDS)})\b(?![/-])")


def harmless(markdown: str) -> str:
    """The text with every mention of people, groups or channels disarmed."""
    return _ALARM.sub(lambda found: found[0] + _JOINER, markdown)


def split(markdown: str) -> list[str]:
    """Pieces of one message each; joined, they are the text. A table is cut between rows."""
    pieces, start, tables = [], 0, _tables(markdown) if len(harmless(markdown)) > LIMIT else []
    while len(harmless(markdown[start:])) > LIMIT:
        end = start + len(split_text(markdown[start:], LIMIT, lambda part: len(harmless(part)))[0])
        for table in tables:
            if table.start < end < table.end and (row := table.cut(markdown, end)) > start:
                end = row
        pieces.append(markdown[start:end])
        start = end
    return [*pieces, markdown[start:]]


def whole(pieces: Sequence[str]) -> list[str]:
    """The pieces with cut code blocks closed and reopened, and with the head repeated for the rest of a cut table."""
    markdown = "".join(pieces)
    tables = _tables(markdown) if len(pieces) > 1 else []
    shown, start = [], 0
    for piece, written in zip(pieces, _whole_fences(pieces), strict=True):
        heads = [markdown[one.start : one.body] for one in tables if one.begins_row(markdown, start)]
        shown.append("".join(head for head in heads if len(harmless(head)) <= _HEAD) + written)
        start += len(piece)
    return shown


@dataclass(frozen=True, slots=True)
class _Table:
    """Offsets of a table in a text: its head, its first row, its end."""

    start: int
    body: int
    end: int

    def cut(self, markdown: str, at: int) -> int:
        """Where to cut instead of `at`: before that row, or before the head if no row would remain with it."""
        row = max((found.end() for found in _LINE_END.finditer(markdown, self.start, at)), default=0)
        return row if row > self.body else self.start

    def begins_row(self, markdown: str, at: int) -> bool:
        return self.body <= at < self.end and markdown[at - 1] in "\r\n"


def _tables(markdown: str) -> list[_Table]:
    """The tables outside lists and quotes."""
    lines = [0, *(found.end() for found in _LINE_END.finditer(markdown)), len(markdown)]
    found = [token.map for token in _parser().parse(markdown) if token.type == "table_open" and token.level == 0]
    return [_Table(lines[at[0]], lines[at[0] + 2], lines[at[1]]) for at in found if at]


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table").disable("inline")


def _whole_fences(pieces: Sequence[str]) -> list[str]:
    shown: list[str] = []
    fence = language = ""
    for piece in pieces:
        first, _, rest = piece.partition("\n")
        if not fence:
            written = piece
        elif _closes(fence, first) and rest.strip():
            written = rest
        else:
            written = f"{fence}{language}\n{piece}"
        for line in piece.split("\n"):
            if fence:
                fence = "" if _closes(fence, line) else fence
            elif found := _FENCE.fullmatch(line):
                fence, language = found[1], found[2]
        shown.append(f"{written.rstrip()}\n{fence}" if fence and len(shown) + 1 < len(pieces) else written)
    return shown


def _closes(fence: str, line: str) -> bool:
    return line.strip().startswith(fence) and not line.strip().strip(fence[0])


def spelled(text: str) -> str:
    """The text with Slack's prefix before commands, since Slack handles leading slashes itself."""
    return _COMMANDS.sub(rf"{COMMAND} \1", text)


def escaped(text: str) -> str:
    """Escape text for mrkdwn."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def growing(markdown: str) -> str:
    """The part of an unfinished text that can be shown: a prefix of `harmless` of any continuation."""
    text = markdown.lstrip()
    return harmless(_OPEN_END.sub("", text.rstrip()))


def plain_text(text: str, bot_user: str = "") -> tuple[bool, str]:
    """(whether the bot is mentioned, the plain text without that mention) of a text in Slack's markup."""
    named = False

    def plain(found: re.Match[str]) -> str:
        nonlocal named
        target, _, label = found[1].partition("|")
        if target[:1] == "@":
            if bot_user and target[1:] == bot_user:
                named = True
                return _NAME
            return f"@{label or target[1:]}"
        if target[:1] == "#":
            return f"#{label or target[1:]}"
        if target[:1] == "!":
            return f"@{label.lstrip('@') or target[1:].partition('^')[0]}"
        address = target.removeprefix("mailto:")
        if _SCHEME.sub("", label).rstrip("/") in ("", _SCHEME.sub("", address).rstrip("/")):
            return address
        return f"[{label}]({target})"

    unescaped = _NAME_END.sub("", _ENTITY.sub(plain, text.replace(_NAME, "")))
    return named, unescaped.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()
