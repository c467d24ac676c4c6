"""Parser of models' Markdown: CommonMark with tables, formulas, and emphasis beside Chinese without spaces."""

import re
import unicodedata
from functools import lru_cache

from markdown_it import MarkdownIt
from markdown_it.common.utils import isMdAsciiPunct, isPunctChar, isWhiteSpace
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline, emphasis

_LONGEST, _MOST_LINES = 4096, 100  # characters of an inline formula; lines of a block formula
_FORMULAS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
# Between single dollars: one word, or text with \ ^ or _. Prices do not match.
_IN_DOLLARS = re.compile(r"(?<![\w$])\$(?=[^\s$])(?:[^\s$`]+|(?=[^$\n`]*[\\^_])[^$\n`]*[^\s$`])\$(?![\w$])")


@lru_cache(maxsize=1)
def parser() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    made.inline.ruler.at("emphasis", _emphasis)
    made.inline.ruler.before("escape", "formula", _formula)
    made.block.ruler.before("table", "formula", _block_formula, {"alt": ["paragraph", "blockquote", "list"]})
    return made


def _block_formula(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """A block formula: its lines are no lists, headings or quotes."""
    start = state.bMarks[first] + state.tShift[first]
    close = _FORMULAS.get(state.src[start : start + 2])
    if close in (None, "\\)") or state.is_code_block(first) or close in state.src[start + 2 : state.eMarks[first]]:
        return False
    last, end = first + 1, min(end, first + _MOST_LINES)
    while last < end and close not in state.src[state.bMarks[last] + state.tShift[last] : state.eMarks[last]]:
        if state.isEmpty(last) or state.sCount[last] < state.blkIndent:
            return False
        last += 1
    if last == end or state.sCount[last] < state.blkIndent:
        return False
    if not silent:
        state.push("formula", "", 0).content = state.getLines(first, last + 1, state.blkIndent, False).strip()
        state.line = last + 1
    return True


def _formula(state: StateInline, silent: bool) -> bool:
    """An inline formula, kept as it is: its backslashes, stars and underscores are no Markdown."""
    source, start = state.src, state.pos
    close = _FORMULAS.get(source[start : start + 2])
    if close is not None:
        at = source.find(close, start + 2, min(start + _LONGEST, state.posMax))
        end = at + 2 if at >= 0 else start
    else:
        found = _IN_DOLLARS.match(source, start, state.posMax)
        end = found.end() if found else start
    if end == start:
        return False
    if not silent:
        state.push("text", "", 0).content = source[start:end]
    state.pos = end
    return True


def _emphasis(state: StateInline, silent: bool) -> bool:
    """CommonMark emphasis whose stars need no spaces beside Chinese, Japanese or Korean.

    Beside CJK, an inner punctuation mark counts as a letter and an outer character as a space.
    Source: https://github.com/tats-u/markdown-cjk-friendly
    """
    start, before = state.pos, len(state.delimiters)
    if not emphasis.tokenize(state, silent):
        return False
    if state.src[start] == "*":
        last = state.src[start - 1] if start else " "
        following = state.src[state.pos] if state.pos < state.posMax else " "
        for one in state.delimiters[before:]:
            one.open, one.close = _flanks(following, last), _flanks(last, following)
    return True


def _flanks(inner: str, outer: str) -> bool:
    """Whether stars between `outer` and `inner` can open or close emphasis."""
    if isWhiteSpace(ord(inner)):
        return False
    return not _is_mark(inner) or isWhiteSpace(ord(outer)) or _is_mark(outer) or _is_cjk(outer)


def _is_mark(character: str) -> bool:
    return (isMdAsciiPunct(ord(character)) or isPunctChar(character)) and not _is_cjk(character)


def _is_cjk(character: str) -> bool:
    """A wide or halfwidth letter or mark, but no emoji (wide as well)."""
    return unicodedata.east_asian_width(character) in "WFH" and unicodedata.category(character) != "So"
