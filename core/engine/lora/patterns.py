"""Regular expressions that strangers wrote, matched in bounded time. Knows nothing of what they are about.

Python's own matching goes back and tries again, which an expression of ten characters can make take years. Here all
ways are gone at once, character by character (Thompson 1968), so that the work is at most states x characters. What
cannot be matched so (looking ahead or behind, groups referred to) is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from core.i18n.messages import Lazy, Refusal

MOST_CHARACTERS, MOST_STATES = 10_000, 2_000
_parser: Any = importlib.import_module("re._parser")  # what `re` itself reads them with
_CATEGORIES = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w", "NOT_DIGIT": r"\D", "NOT_SPACE": r"\S", "NOT_WORD": r"\W"}

Takes = Callable[[str], bool]  # whether this character leads on
Holds = Callable[[str, str], bool]  # whether one may pass between these two characters; "" where there is none


class Expression:
    """Raises Refused for what is no regular expression, is too large, or needs going back."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Of each state: where it leads by itself, under which condition, and the character that it takes to the next.
        self._free: list[list[tuple[int, Holds | None]]] = []
        self._takes: list[tuple[Takes, int] | None] = []
        self._known: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}
        if len(text) > MOST_CHARACTERS:
            raise Refusal("expression.long", text=repr(text[:40]), limit=MOST_CHARACTERS)
        self._start, self._end = self._state(), self._state()
        try:
            parsed = _parser.parse(text)
            if parsed.state.flags & ~re.UNICODE:
                raise self._refused(Lazy("expression.flags"))
            self._sequence(parsed, self._start, self._end)
        except (re.error, OverflowError) as error:
            raise Refusal("expression.none", text=repr(text), error=error) from error
        except RecursionError:
            raise self._refused(Lazy("expression.deep")) from None

    def matches(self, whole: str) -> bool:
        """As `re.fullmatch` says, of a text of one line."""
        states, before = frozenset((self._start,)), ""
        for character in whole:
            key = states, before, character
            if key not in self._known:
                self._known[key] = self._step(*key)
            states, before = self._known[key], character
            if not states:
                return False
        return self._end in self._closure(states, before, "")

    # --- going ---

    def _step(self, states: frozenset[int], before: str, character: str) -> frozenset[int]:
        ways = (self._takes[state] for state in self._closure(states, before, character))
        return frozenset(way[1] for way in ways if way is not None and way[0](character))

    def _closure(self, states: frozenset[int], before: str, after: str) -> set[int]:
        """All states that can be reached between two characters."""
        seen, waiting = set(states), list(states)
        while waiting:
            for state, holds in self._free[waiting.pop()]:
                if state not in seen and (holds is None or holds(before, after)):
                    seen.add(state)
                    waiting.append(state)
        return seen

    # --- building ---

    def _state(self) -> int:
        if len(self._free) >= MOST_STATES:
            raise self._refused(Lazy("expression.large"))
        self._free.append([])
        self._takes.append(None)
        return len(self._free) - 1

    def _sequence(self, parts: Any, start: int, end: int) -> None:
        for kind, given in parts:
            behind = self._state()
            self._part(str(kind), given, start, behind)
            start = behind
        self._free[start].append((end, None))

    def _part(self, kind: str, given: Any, start: int, end: int) -> None:
        match kind:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "RANGE" | "CATEGORY":
                self._takes[start] = _taking(kind, given), end
            case "AT" if (holds := _holding(str(given))) is not None:
                self._free[start].append((end, holds))
            case "BRANCH":
                for one in given[1]:
                    self._sequence(one, begin := self._state(), end)
                    self._free[start].append((begin, None))
            case "SUBPATTERN" if not given[1] and not given[2]:
                self._sequence(given[3], start, end)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, part = given
                self._repeat(int(least), most, part, start, end)
            case _:
                raise self._refused(Lazy("expression.unsupported", what=kind.lower().replace("_", " ")))

    def _repeat(self, least: int, most: Any, part: Any, start: int, end: int) -> None:
        for _ in range(least):
            self._sequence(part, start, behind := self._state())
            start = behind
        if most is _parser.MAXREPEAT:
            self._sequence(part, again := self._state(), again)
            self._free[start].append((again, None))
            self._free[again].append((end, None))
            return
        for _ in range(int(most) - least):
            self._free[start].append((end, None))
            self._sequence(part, start, behind := self._state())
            start = behind
        self._free[start].append((end, None))

    def _refused(self, why: Lazy) -> Refusal:
        shown = self.text if len(self.text) <= 200 else f"{self.text[:200]}..."
        return Refusal("expression.unbounded", text=repr(shown), why=why)


@lru_cache(maxsize=256)
def expression(text: str) -> Expression:
    """The same object for the same text. Raises Refused."""
    return Expression(text)


def _taking(kind: str, given: Any) -> Takes:
    match kind:
        case "LITERAL":
            return lambda character: ord(character) == given
        case "NOT_LITERAL":
            return lambda character: ord(character) != given
        case "ANY":
            return lambda character: character != "\n"
        case "RANGE":
            return lambda character: given[0] <= ord(character) <= given[1]
        case "CATEGORY":
            of_it = re.compile(_CATEGORIES[str(given).removeprefix("CATEGORY_")])
            return lambda character: of_it.fullmatch(character) is not None
    negated = str(given[0][0]) == "NEGATE"
    some = [_taking(str(one), what) for one, what in given[negated:]]
    return lambda character: any(takes(character) for takes in some) is not negated


def _holding(kind: str) -> Holds | None:
    """None for a condition that is not known."""

    def edge(before: str, after: str) -> bool:
        return _is_word(before) is not _is_word(after)

    known: dict[str, Holds] = {
        "AT_BEGINNING": lambda before, after: not before,
        "AT_BEGINNING_STRING": lambda before, after: not before,
        "AT_END": lambda before, after: not after,
        "AT_END_STRING": lambda before, after: not after,
        "AT_BOUNDARY": edge,
        "AT_NON_BOUNDARY": lambda before, after: bool(before or after) and not edge(before, after),
    }
    return known.get(kind)


def _is_word(character: str) -> bool:
    return bool(character) and (character.isalnum() or character == "_")
