"""A typed line -> words, quoted in any of the ways in which keyboards quote, or key=value. Knows no command."""

from __future__ import annotations

import re
from dataclasses import dataclass

_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "«": "»", "＂": "＂"}
_CLOSING = "".join(_QUOTES.values())
_SETTING = re.compile(r"([A-Za-z_]+)[=＝]")


@dataclass(frozen=True, slots=True)
class Word:
    """One word. `start` is where it stands in the line; `setting` is its key, where it is key=value."""

    text: str
    start: int
    quoted: bool = False

    @property
    def setting(self) -> str:
        found = _SETTING.match(self.text)
        return found[1] if found else ""


def split_words(line: str) -> list[Word]:
    """Words, quoted or not. A quote opens before a word or after "=", and closes before a space: any other is text."""
    tokens, at = [], 0
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        start, text, quoted = at, "", line[at] in _QUOTES
        while at < len(line) and not line[at].isspace():
            opens = at == start or line[at - 1] in "=＝" or line[at - 1] in _CLOSING
            end = _closing(line, at) if opens and line[at] in _QUOTES else -1
            if end < 0:
                text, at = text + line[at], at + 1
            else:
                text, at = text + line[at + 1 : end], end + 1
        tokens.append(Word(text, start, quoted))
    return tokens


def as_word(text: str) -> str:
    """How it is typed to be read as one word: in quotes where it needs them."""
    return text if split_words(text) == [Word(text, 0)] and not Word(text, 0).setting else f'"{text}"'


def _closing(line: str, opened: int) -> int:
    """Where the quote that opens there closes: before a space, the end or another quote. -1 where it never does."""
    close = _QUOTES[line[opened]]
    at = line.find(close, opened + 1)
    while at >= 0:
        following = line[at + 1 : at + 2]
        if not following or following.isspace() or following in _QUOTES:
            return at
        at = line.find(close, at + 1)
    return -1
