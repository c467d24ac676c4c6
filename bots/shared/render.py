"""Text for display: splitting within a limit, Markdown blocks that are complete, plain text."""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import urlsplit

import regex
from markdown_it import MarkdownIt  # the parser that rich uses

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？；][”’」』）]*\s*")
_LINE_END = re.compile(r"\n+")
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_WORD_END = re.compile(r"\s+|(?<=[，、：])")
_PREFERRED = ((_PARAGRAPH_END, 0.5), (_SENTENCE_END, 0.5), (_LINE_END, 0.3), (_WORD_END, 0.0))
_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*://)?([^\s/:?#@]+\.[a-z]{2,})(?=[/:?#]|$)", re.IGNORECASE)
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_GRAPHEME = regex.compile(r"\X")


def split_text(text: str, limit: int, measure: Callable[[str], int] = len) -> tuple[str, ...]:
    """Split at a paragraph, else a sentence, a line, a word, else between graphemes; joined, the parts are the text.

    `measure` is how the platform counts (Telegram: UTF-16 units); it must never shrink when text is added.
    """
    parts = []
    while measure(text) > limit:
        cut = _cut(text, _longest_prefix(text, limit, measure))
        parts.append(text[:cut])
        text = text[cut:]
    return (*parts, text) if text or not parts else tuple(parts)


def _longest_prefix(text: str, limit: int, measure: Callable[[str], int]) -> int:
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(text[:middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _cut(text: str, end: int) -> int:
    """The best place to cut in text[:end]; `end` itself only inside a grapheme longer than that."""
    graphemes = [match.start() for match in _GRAPHEME.finditer(text, 0, end + 1)]
    boundaries = {*graphemes, len(text)}
    for pattern, least in _PREFERRED:
        ends = [match.end() for match in pattern.finditer(text, 0, end) if match.end() >= max(1, end * least)]
        for place in reversed(ends):
            if place in boundaries:
                return place
    return next((place for place in reversed(graphemes) if 0 < place <= end), end)


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    return MarkdownIt().enable("strikethrough").enable("table")


def closed_blocks(markdown: str) -> tuple[str, str]:
    """The Markdown blocks that no further text can change, and the rest.

    For every `more`, the first part of closed_blocks(markdown + more) begins with that of closed_blocks(markdown).
    """
    whole_lines = markdown[: markdown.rfind("\n") + 1]
    starts = [token.map[0] for token in _parser().parse(whole_lines) if token.level == 0 and token.map]
    if len(starts) < 2:
        return "", markdown
    end = sum(len(line) for line in whole_lines.split("\n")[: starts[-1]]) + starts[-1]
    return markdown[:end], markdown[end:]


def printable(text: str) -> str:
    """The text without control characters and changes of direction: they steer a terminal or hide what it shows."""
    kept = (c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    return "".join(c for c in kept if c not in _DIRECTION)


def misleads(label: str, url: str) -> bool:
    """Whether the text of a link names an address on another host than the one it leads to."""
    shown = _ADDRESS.match(label.strip())
    if shown is None:
        return False
    try:
        return _host(shown[1]) != _host(urlsplit(url).hostname or "")
    except ValueError:  # no address at all
        return True


def _host(name: str) -> str:
    return name.lower().rstrip(".").removeprefix("www.")


def plain(markdown: str) -> str:
    """The text without its markup, line for line."""
    inlines = [token.children or [] for token in _parser().parse(markdown) if token.type == "inline"]
    return "\n".join("".join("\n" if "break" in part.type else part.content for part in parts) for parts in inlines)
