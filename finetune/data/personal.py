"""Personal data in a text: mail addresses, phones, cards, IBANs, access tokens. Pure; knows no files and no model.

Patterns with their checksums where there are any (Luhn for cards, ISO 7064 mod 97 for IBANs). They find what has a
form; a name or a street has none, so "nothing found" is no promise that nothing is there.
"""

from __future__ import annotations

import re
from collections import Counter

# A character of a word where words are set apart: Thai, Chinese, Japanese and Korean stand close to what is found.
_W = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_TOKEN = re.compile(
    rf"(?<!{_W})(?:sk-[A-Za-z0-9_-]{{20,200}}|xox[abeprs]-[A-Za-z0-9_-]{{10,200}}|xapp-[A-Za-z0-9_-]{{10,200}}"
    r"|gh[opsur]_[A-Za-z0-9_]{36}|github_pat_[A-Za-z0-9_]{22,200}|AKIA[0-9A-Z]{16}|\d{8,10}:[A-Za-z0-9_-]{35})"
    r"(?![A-Za-z0-9_-])"
)
_MAIL = re.compile(
    rf"(?<!{_W})(?<![.+-])(?:{_W}|[.+-]){{1,64}}@[A-Za-z0-9-]{{1,63}}(?:\.[A-Za-z0-9-]{{1,63}}){{1,8}}(?!{_W})"
)
_IBAN = re.compile(rf"(?<!{_W})[A-Z]{{2}}\d{{2}}(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?(?!{_W})")
_CARD = re.compile(r"(?<![\d.+-])\d(?:[ -]?\d){12,18}(?![\d-])")
_PHONE = re.compile(
    rf"(?<!{_W})(?<!\.)(?:\+\d(?:[ ()./-]{{0,2}}\d){{7,14}}(?!\d)|\(\d{{3}}\) ?\d{{3}}[ .-]\d{{4}}(?!\d)"
    r"|[2-9]\d\d([.-])[2-9]\d\d\1\d{4}(?![\d-])(?!\.\d)|0\d{2,4}[ /-]\d{5,9}(?!\d)"
    rf"|(?<!\+)1[3-9]\d[ -]?\d{{4}}[ -]?\d{{4}}(?!{_W}))"
)
_PATTERNS = (("token", _TOKEN), ("mail", _MAIL), ("iban", _IBAN), ("card", _CARD), ("phone", _PHONE))
KINDS = tuple(kind for kind, _ in _PATTERNS)


def find(text: str) -> Counter[str]:
    """How often each kind of KINDS is in the text; what one kind has taken is of no other."""
    return _taken(text)[1]


def redact(text: str) -> tuple[str, int]:
    """(the text with a word like [phone] in the place of each piece that `find` counts, how many there were)."""
    left, found = _taken(text)
    return left, found.total()


def _taken(text: str) -> tuple[str, Counter[str]]:
    """What one takes may show another that stood close to it: so each has its turn as often as there are kinds."""
    found: Counter[str] = Counter()
    for _ in _PATTERNS:
        before = found.total()
        for kind, pattern in _PATTERNS:
            text, count = _without(kind, pattern, text)
            found[kind] += count
        if found.total() == before:
            break
    return text, +found


def _without(kind: str, pattern: re.Pattern[str], text: str) -> tuple[str, int]:
    """Behind each piece the text begins anew: what follows without a gap is found too."""
    kept, count, at = [], 0, 0
    while match := pattern.search(text, at):
        at = match.end()
        if _is_true(kind, match[0]):
            kept.append(f"{text[: match.start()]}[{kind}]")
            text, count, at = text[at:], count + 1, 0
    return "".join([*kept, text]), count


def _is_true(kind: str, text: str) -> bool:
    return _is_card(text) if kind == "card" else _is_iban(text) if kind == "iban" else True


def _is_card(text: str) -> bool:
    """Luhn's sum: every second digit from the right doubled, digits of the doubles added."""
    digits = [int(char) for char in reversed(text) if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616: the first four characters to the end, letters as 10 to 35, and the number is 1 modulo 97."""
    packed = text.replace(" ", "")
    return int("".join(str(int(char, 36)) for char in packed[4:] + packed[:4])) % 97 == 1
