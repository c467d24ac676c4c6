"""Text on its way to a screen: cutting, Markdown blocks, plain text. Pure; knows nothing of platforms or replies."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from markdown_it import MarkdownIt  # what rich itself parses Markdown with

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？；][”’」』）]*\s*")
_LINE_END = re.compile(r"\n+")
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_WORD_END = re.compile(r"\s+|(?<=[，、：])")
_PREFERRED = ((_PARAGRAPH_END, 0.5), (_SENTENCE_END, 0.5), (_LINE_END, 0.3), (_WORD_END, 0.0))
_ZWJ = "\u200d"
_LATE_VOWELS = "\u0e33\u0eb3"  # Thai and Lao AM: letters by category, marks by behaviour


def split_text(text: str, limit: int, measure: Callable[[str], int] = len) -> tuple[str, ...]:
    """Cut at a paragraph, else a sentence, a line, a word, else between two graphemes; joined, the parts are the text.

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
    """The best place to cut in text[:end]; `end` itself only inside a word longer than that."""
    for pattern, least in _PREFERRED:
        ends = [match.end() for match in pattern.finditer(text, 0, end) if match.end() >= max(1, end * least)]
        for place in reversed(ends):
            if is_boundary(text, place):
                return place
    for place in range(end, 0, -1):
        if is_boundary(text, place):
            return place
    return end  # one grapheme alone is longer than the limit


def is_boundary(text: str, index: int) -> bool:
    """Whether a cut before text[index] leaves every grapheme whole, by the rules of UAX 29 that matter in chats."""
    if index <= 0 or index >= len(text):
        return True
    before, after = text[index - 1], text[index]
    if before == "\r" and after == "\n":
        return False
    if before in "\r\n" or after in "\r\n":
        return True
    if _extends(after) or before == _ZWJ:
        return False
    if _regional(before) and _regional(after):
        run = len(text[:index]) - len(text[:index].rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))
        return run % 2 == 0
    return not _joins_hangul(before, after)


def _extends(character: str) -> bool:
    code = ord(character)
    return (
        unicodedata.category(character) in ("Mn", "Me", "Mc")
        or character in ("\u200c", _ZWJ)
        or character in _LATE_VOWELS
        or 0x1F3FB <= code <= 0x1F3FF  # skin tones
        or 0xE0020 <= code <= 0xE007F  # tags of flags
        or 0xFF9E <= code <= 0xFF9F  # half-width sound marks
    )


def _regional(character: str) -> bool:
    return 0x1F1E6 <= ord(character) <= 0x1F1FF


def _joins_hangul(before: str, after: str) -> bool:
    first, second = _hangul(before), _hangul(after)
    return (first == "L" and second in ("L", "V", "S")) or (first in ("V", "T", "S") and second in ("V", "T"))


def _hangul(character: str) -> str:
    code = ord(character)
    if 0x1100 <= code <= 0x115F or 0xA960 <= code <= 0xA97C:
        return "L"
    if 0x1160 <= code <= 0x11A7 or 0xD7B0 <= code <= 0xD7C6:
        return "V"
    if 0x11A8 <= code <= 0x11FF or 0xD7CB <= code <= 0xD7FB:
        return "T"
    return "S" if 0xAC00 <= code <= 0xD7A3 else ""


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    return MarkdownIt().enable("strikethrough").enable("table")


def closed_blocks(markdown: str) -> tuple[str, str]:
    """The Markdown blocks that more text cannot change any more, and the rest.

    For every `more`, the first part of closed_blocks(markdown + more) begins with that of closed_blocks(markdown).
    """
    whole_lines = markdown[: markdown.rfind("\n") + 1]
    starts = [token.map[0] for token in _parser().parse(whole_lines) if token.level == 0 and token.map]
    if len(starts) < 2:
        return "", markdown
    end = sum(len(line) for line in whole_lines.split("\n")[: starts[-1]]) + starts[-1]
    return markdown[:end], markdown[end:]


def printable(text: str) -> str:
    """Without the control characters by which a text could take over a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def plain(markdown: str) -> str:
    """The text without its markup, for places that show none: a line for each line."""
    inlines = [token.children or [] for token in _parser().parse(markdown) if token.type == "inline"]
    return "\n".join("".join("\n" if "break" in part.type else part.content for part in parts) for parts in inlines)
