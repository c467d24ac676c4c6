"""Soundness of an answer: it ends, does not loop, and does not recite the instructions. Works on token ids."""

from collections.abc import Collection, Sequence

ASKED = 16  # questions of the test rows
LEAST_TOKENS, MOST_TOKENS = 64, 256
_RUN = 4  # repetitions that make a loop
_LONGEST_LOOP = 24
_LEAK = 12  # consecutive tokens of the instructions


def longest(answers: Sequence[int]) -> int:
    """Token limit of an answer, from the lengths of the answers in the data."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, 2 * max(answers, default=0)))


def unsound(answer: Sequence[int], instructions: Sequence[int], ends: Collection[int]) -> bool:
    """Whether an answer is cut, loops, or recites the instructions."""
    return not answer or answer[-1] not in ends or loops(answer) or leaks(answer, instructions)


def loops(answer: Sequence[int]) -> bool:
    """Whether up to _LONGEST_LOOP tokens repeat _RUN times in a row."""
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
