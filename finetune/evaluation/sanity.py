"""Whether answers look like answers: they come to an end, do not go round in circles, and do not recite the prompt.

Token ids in, a count out. Knows no model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

ASKED = 16  # questions of the test rows
LEAST_TOKENS, MOST_TOKENS = 64, 256
_RUN = 4  # times that something may stand there one after another
_LONGEST_LOOP = 24
_LEAK = 12  # tokens of the prompt's instructions in one piece


def longest(answers: Sequence[int]) -> int:
    """How many tokens an answer may take, by how long those of the data are."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, 2 * max(answers, default=0)))


def unsound(answer: Sequence[int], instructions: Sequence[int], ends: Collection[int]) -> bool:
    """Whether one answer is cut, loops, or recites the channel's instructions."""
    return not answer or answer[-1] not in ends or loops(answer) or leaks(answer, instructions)


def loops(answer: Sequence[int]) -> bool:
    """Whether a piece of up to _LONGEST_LOOP tokens stands there _RUN times and more in a row."""
    for size in range(1, _LONGEST_LOOP + 1):
        run = 0
        for at in range(size, len(answer)):
            run = run + 1 if answer[at] == answer[at - size] else 0
            if run >= max(size * (_RUN - 1), 8):
                return True
    return False


def leaks(answer: Sequence[int], instructions: Sequence[int]) -> bool:
    pieces = {tuple(instructions[at : at + _LEAK]) for at in range(len(instructions) - _LEAK + 1)}
    return any(tuple(answer[at : at + _LEAK]) in pieces for at in range(len(answer) - _LEAK + 1))
