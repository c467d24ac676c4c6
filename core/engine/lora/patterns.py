"""Regular expressions from foreign adapter configurations, matched in linear time by RE2.

Python's `re` backtracks: an expression of ten characters can take years. RE2 refuses what needs backtracking
(look-around, backreferences). What both accept means the same for module names, which are ASCII without line breaks,
except for the two spellings in DIFFERENT, which are refused.
"""

import re
from functools import lru_cache

import re2

from core.i18n.messages import Refusal

MAX_CHARACTERS, MAX_INSTRUCTIONS, MAX_BYTES = 10_000, 4_000, 2**20  # of the text, of RE2's program, of its memory
DIFFERENT = ("[:", "{,")  # POSIX classes and {,n}: RE2 and Python read them differently


@lru_cache(maxsize=256)
def compile_pattern(text: str) -> re2._Regexp:
    """An object whose `fullmatch` is that of `re`. Raises Refusal."""
    shown = repr(text if len(text) <= 200 else f"{text[:200]}...")
    if len(text) > MAX_CHARACTERS:
        raise Refusal("expression.large", text=shown)
    try:
        re.compile(text)
    except (re.error, OverflowError) as error:
        raise Refusal("expression.none", text=shown, error=error) from error
    except RecursionError:
        raise Refusal("expression.large", text=shown) from None
    if found := next((part for part in DIFFERENT if part in text), ""):
        raise Refusal("expression.unbounded", text=shown, why=found)
    options = re2.Options()
    options.max_mem, options.log_errors = MAX_BYTES, False
    try:
        pattern = re2.compile(text, options)
    except re2.error as error:
        raise Refusal("expression.unbounded", text=shown, why=error.args[0].decode("utf-8", "replace")) from error
    if pattern.programsize > MAX_INSTRUCTIONS:
        raise Refusal("expression.large", text=shown)
    return pattern
