"""Markdown -> text with entities, in messages of at most 4,096 UTF-16 units.

Text is rendered first and cut afterwards, so that no markup is torn; an entity longer than a message becomes two.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aiogram.types import MessageEntity
from markdown_it.tree import SyntaxTreeNode

from bots.shared.render import misleads, printable, split_text
from bots.telegram.sending.markdown import parser

LIMIT = 4096  # UTF-16 units of one message
MAX_ENTITIES = 100  # Telegram ignores those beyond
_MAX_MARKUP = 60_000  # characters; longer texts are not rendered
_NOTHING = "–"
_WHOLE = ("pre", "code", "text_link")
_INLINE = {"strong": "bold", "em": "italic", "s": "strikethrough"}
_LINKS = ("http://", "https://", "tg://", "mailto:", "tel:")


@dataclass(frozen=True, slots=True)
class Mark:
    """One entity; offsets in characters."""

    kind: str
    start: int
    end: int
    url: str = ""
    language: str = ""


@dataclass(frozen=True, slots=True)
class RenderedText:
    text: str
    marks: tuple[Mark, ...] = ()

    def entities(self) -> list[MessageEntity]:
        """Telegram's entities: offsets and lengths in UTF-16 units."""
        made = []
        for mark in self.marks[:MAX_ENTITIES]:
            start, length = units(self.text[: mark.start]), units(self.text[mark.start : mark.end])
            url, language = mark.url or None, mark.language or None
            made.append(MessageEntity(type=mark.kind, offset=start, length=length, url=url, language=language))
        return made


def units(text: str) -> int:
    """Length in UTF-16 units."""
    return len(text) + sum(character > "\uffff" for character in text)


def render(markdown: str) -> RenderedText:
    """Render Markdown. Never fails: what the parser cannot handle is shown unrendered."""
    source = printable(markdown.replace("\r\n", "\n").replace("\r", "\n"))
    if len(source) > _MAX_MARKUP:
        return RenderedText(source)
    try:
        page = _Page()
        page.blocks(SyntaxTreeNode(parser().parse(source)).children)
        made = page.done()
    except Exception:  # the reply is shown without markup
        made = RenderedText("")
    return made if made.text.strip() else RenderedText(source.strip() or _NOTHING)


def split(whole: RenderedText, limit: int = LIMIT) -> tuple[RenderedText, ...]:
    """Messages of at most `limit` units, none blank; their joined texts are the text."""
    parts, rest, text = [], whole.marks, whole.text
    while units(text) > limit:
        cut = _cut(text, rest, limit)
        while cut < len(text) and text[cut].isspace() and units(text[: cut + 1]) <= limit:
            cut += 1
        parts.append(RenderedText(text[:cut], _within(rest, 0, cut)))
        rest, text = _within(rest, cut, len(text)), text[cut:]
    parts.append(RenderedText(text, rest))
    kept = [part for part in parts if part.text.strip()]  # Telegram refuses blank messages
    return tuple(kept) or (RenderedText(_NOTHING),)


def head(whole: RenderedText, limit: int = LIMIT) -> RenderedText:
    """The text, or its beginning with an ellipsis."""
    if units(whole.text) <= limit:
        return whole
    first = split(whole, limit - 2)[0]
    return RenderedText(f"{first.text.rstrip()} …", _within(first.marks, 0, len(first.text.rstrip())))


def tail(whole: RenderedText, limit: int = LIMIT) -> RenderedText:
    """The text, or its end with an ellipsis."""
    if units(whole.text) <= limit:
        return whole
    start = len(whole.text) - (limit // 2 - 2)
    line = whole.text.find("\n", start, start + 400)
    start = line + 1 if line >= 0 else start
    marks = _within(whole.marks, start, len(whole.text))
    return RenderedText(f"… {whole.text[start:]}", tuple(replace(m, start=m.start + 2, end=m.end + 2) for m in marks))


def first_line(markdown: str, limit: int = 200) -> RenderedText:
    """The first line with an ellipsis: a message's text before its final edit."""
    whole = render(markdown) if markdown.strip() else RenderedText("")
    line = whole.text.strip().split("\n", 1)[0]
    line = split_text(line, limit, units)[0].rstrip() if line else ""
    return RenderedText(f"{line} …".strip())


# --- cutting ---


def _cut(text: str, marks: Sequence[Mark], limit: int) -> int:
    """Where to cut: as `split_text`, or before code or a link that would be torn, if little space is wasted."""
    cut = len(split_text(text, limit, units)[0])
    for mark in [mark for mark in marks if mark.start < cut < mark.end and mark.kind in _WHOLE]:
        if units(text[mark.start : mark.end]) <= limit and mark.start >= cut * 0.3:
            cut = min(cut, mark.start)
    return cut


def _within(marks: Sequence[Mark], start: int, end: int) -> tuple[Mark, ...]:
    """The marks of text[start:end], with offsets from `start`."""
    return tuple(
        replace(mark, start=max(mark.start, start) - start, end=min(mark.end, end) - start)
        for mark in marks
        if mark.start < end and mark.end > start
    )


# --- rendering ---


class _Page:
    """Text and marks of the blocks rendered so far."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._marks: list[Mark] = []
        self._quoted = False

    def done(self) -> RenderedText:
        text = "".join(self._pieces)
        marks = [_trimmed(text, mark) for mark in _legal(self._marks)]
        return RenderedText(text, tuple(sorted((m for m in marks if m.end > m.start), key=lambda m: (m.start, -m.end))))

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self._length += len(text)

    def mark(self, kind: str, start: int, *, url: str = "", language: str = "") -> None:
        self._marks.append(Mark(kind, start, self._length, url, language))

    # --- blocks ---

    def blocks(self, nodes: Sequence[SyntaxTreeNode], between: str = "\n\n", indent: str = "") -> None:
        for number, node in enumerate(nodes):
            if number:
                self.add(between + indent)
            self._block(node, indent)

    def _block(self, node: SyntaxTreeNode, indent: str) -> None:
        start = self._length
        match node.type:
            case "heading":
                self._inlines(node.children, indent)
                self.mark("bold", start)
            case "bullet_list" | "ordered_list":
                self._list(node, indent)
            case "fence" | "code_block":
                self.add(node.content.removesuffix("\n"))
                self.mark("pre", start, language=(node.info.split() or [""])[0][:32])
            case "blockquote":
                self._quote(node, indent)
            case "formula":
                self.add(node.content.replace("\n", f"\n{indent}"))
            case "hr":
                self.add("———")
            case "table":
                self.add(_table(node))
                self.mark("pre", start)
            case _:
                self._inlines(node.children, indent)

    def _list(self, node: SyntaxTreeNode, indent: str) -> None:
        first = int(node.attrs.get("start", 1)) if node.type == "ordered_list" else None
        tight = all(not child.children or child.children[0].hidden for child in node.children)
        between = "\n" if tight else "\n\n"
        for position, item in enumerate(node.children):
            bullet = "• " if first is None else f"{first + position}. "
            self.add((between + indent if position else "") + bullet)
            self.blocks(item.children, between, f"{indent}  ")

    def _quote(self, node: SyntaxTreeNode, indent: str) -> None:
        start, outer = self._length, self._quoted
        self._quoted = True
        self.blocks(node.children, "\n\n", indent)
        self._quoted = outer
        if not outer:  # Telegram has no nested quotes
            self.mark("blockquote", start)

    # --- inside of a line ---

    def _inlines(self, nodes: Sequence[SyntaxTreeNode], indent: str) -> None:
        for node in nodes:
            self._inline(node, indent)

    def _inline(self, node: SyntaxTreeNode, indent: str) -> None:
        start = self._length
        match node.type:
            case "text":
                self.add(node.content)
            case "softbreak" | "hardbreak":
                self.add(f"\n{indent}")
            case "code_inline":
                self.add(node.content)
                self.mark("code", start)
            case "strong" | "em" | "s":
                self._inlines(node.children, indent)
                self.mark(_INLINE[node.type], start)
            case "link" | "image":
                self._link(node, indent)
            case _:
                self._inlines(node.children, indent)

    def _link(self, node: SyntaxTreeNode, indent: str) -> None:
        url, start = _url(node), self._length
        self._inlines(node.children, indent)
        if self._length == start:
            self.add(url)
        elif url.lower().startswith(_LINKS):
            self.mark("text_link", start, url=url)
            if misleads("".join(map(_plain, node.children)), url):
                self.add(f" ({url})")
        elif url:
            self.add(f" ({url})")


def _table(node: SyntaxTreeNode) -> str:
    """A table for a monospaced font: padded columns, a rule below the head."""
    rows = [[_plain(cell) for cell in row.children] for part in node.children for row in part.children]
    widths = [max(_width(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = [
        " │ ".join(_padded(cell, width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "─┼─".join("─" * width for width in widths), *lines[1:]])


def _plain(node: SyntaxTreeNode) -> str:
    if node.type in ("text", "code_inline"):
        return node.content
    if node.type.endswith("break"):
        return " "
    shown, url = "".join(_plain(child) for child in node.children), _url(node)
    if not url or node.markup == "autolink":
        return shown
    return f"{shown} ({url})" if shown else url


def _url(node: SyntaxTreeNode) -> str:
    return str(node.attrs.get("href") or node.attrs.get("src") or "")


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _legal(marks: Sequence[Mark]) -> list[Mark]:
    """Split marks around code: Telegram allows code inside quotes only, and no other mark inside code."""
    codes = [mark for mark in marks if mark.kind in ("pre", "code")]
    legal: list[Mark] = []
    for mark in marks:
        pieces = [mark]
        if mark.kind not in ("pre", "code", "blockquote"):
            for code in codes:
                pieces = [piece for one in pieces for piece in _around(one, code)]
        legal += pieces
    return legal


def _around(mark: Mark, code: Mark) -> list[Mark]:
    if code.end <= mark.start or code.start >= mark.end:
        return [mark]
    before = [replace(mark, end=code.start)] * (code.start > mark.start)
    return before + [replace(mark, start=code.end)] * (code.end < mark.end)


def _trimmed(text: str, mark: Mark) -> Mark:
    """The mark without spaces at its ends, as Telegram trims it."""
    inside = text[mark.start : mark.end]
    before, after = (len(inside) - len(cut) for cut in (inside.lstrip(), inside.rstrip()))
    return replace(mark, start=mark.start + before, end=mark.end - after)
