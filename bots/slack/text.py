"""Markdown on its way to Slack, and Slack's marked-up text on its way to the model. Pure.

Slack takes standard Markdown; what could ping somebody is made harmless by an invisible word joiner.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from core.commands import COMMANDS

LIMIT = 11_000  # characters of Markdown blocks in one message: Slack refuses above some 13,200 for all blocks
_JOINER = "\u2060"
_ALARM = re.compile(  # not what is HTML, an address or a path
    r"<(?=(?i:!(?!doctype)[a-z])|@[UW][A-Z0-9]|#[CDG][A-Z0-9])"
    r"|(?i:(?<![a-z0-9])(?<![a-z0-9]/)@(?=(?:channel|here|everyone)(?![a-z0-9])))"
)
_OPEN_END = re.compile(r"(?:<(?:![a-zA-Z]{0,7}|@[UW]?|#[CDG]?)?|@[a-zA-Z]{0,8})\Z")
_FENCE = re.compile(r" {0,3}(`{3,20}|~{3,20})[ \t]*([^\s`]{0,40})[^`]*")
_NAME = "\0"  # where the bot was named
_NAME_END = re.compile(f"{_NAME}[ ,:]*")
_SCHEME = re.compile(r"\A(?:https?://|tel:)")
_ENTITY = re.compile(r"<([^<>\n]*)>")
COMMAND = "/distributary"
_COMMANDS = re.compile(rf"(?<![\w/.:@-])/({'|'.join(command.name for command in COMMANDS)})\b(?![/-])")


def harmless(markdown: str) -> str:
    """The text without anything that Slack reads as a ping of people, groups or channels."""
    return _ALARM.sub(lambda found: found[0] + _JOINER, markdown)


def whole_fences(pieces: Sequence[str]) -> list[str]:
    """The pieces of a text as they are written: a code block that is cut ends there, and begins again in the next."""
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
    """Our own sentences, with commands as they are typed here: Slack keeps what begins with a slash for itself."""
    return _COMMANDS.sub(rf"{COMMAND} \1", text)


def escaped(text: str) -> str:
    """For Slack's own markup, in views."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def growing(markdown: str) -> str:
    """What of a text that still grows can be shown: `harmless` of it begins `harmless` of all that may follow."""
    text = markdown.lstrip()
    return harmless(_OPEN_END.sub("", text.rstrip()))


def read(text: str, bot_user: str = "") -> tuple[bool, str]:
    """What a person wrote, as they meant it; whether the bot is named in it, whose name is left out."""
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

    said = _NAME_END.sub("", _ENTITY.sub(plain, text.replace(_NAME, "")))
    said = said.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return named, said.strip()
