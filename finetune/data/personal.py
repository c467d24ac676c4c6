"""Personal data in a text: mail addresses, phone numbers, cards, IBANs, access tokens, by pattern and checksum.

Luhn for cards, ISO 7064 mod 97 for IBANs. Names and street addresses have no pattern and are not found.
"""

import re
from collections import Counter

# A word character of scripts with spaces between words; Thai, Lao, Chinese, Japanese and Korean have none.
_W = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_TOKEN = re.compile(
    rf"(?<!{_W})(?:sk-[A-Za-z0-9_-]{{20,200}}+|xox[abeprs]-[A-Za-z0-9_-]{{10,200}}+|xapp-[A-Za-z0-9_-]{{10,200}}+"
    r"|gh[opsur]_[A-Za-z0-9_]{36}|github_pat_[A-Za-z0-9_]{22,200}+|AKIA[0-9A-Z]{16}|\d{8,10}:[A-Za-z0-9_-]{35})"
    r"(?![A-Za-z0-9_-])"
)
_MAIL = re.compile(
    rf"(?<!{_W})(?<![.+-])(?:{_W}|[.+-]){{1,64}}+@[A-Za-z0-9-]{{1,63}}(?:\.[A-Za-z0-9-]{{1,63}}){{1,8}}(?!{_W})"
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
    """Occurrences by kind (KINDS); a piece of text counts for one kind only."""
    return _taken(text)[1]


def redact(text: str) -> tuple[str, int]:
    """(text with each piece that `find` counts replaced by [kind], number of replacements)."""
    left, found = _taken(text)
    return left, found.total()


def _taken(text: str) -> tuple[str, Counter[str]]:
    """Repeats all patterns, since a replacement may expose an adjacent match."""
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
    """Searches the rest after a match as a new text, so adjacent matches are found."""
    kept, count, at = [], 0, 0
    while match := pattern.search(text, at):
        at = match.end()
        if _is_valid(kind, match[0]):
            kept.append(f"{text[: match.start()]}[{kind}]")
            text, count, at = text[at:], count + 1, 0
    return "".join([*kept, text]), count


def _is_valid(kind: str, text: str) -> bool:
    return _is_card(text) if kind == "card" else _is_iban(text) if kind == "iban" else True


def _is_card(text: str) -> bool:
    """Luhn checksum."""
    digits = [int(char) for char in reversed(text) if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616 checksum."""
    packed = text.replace(" ", "")
    return int("".join(str(int(char, 36)) for char in packed[4:] + packed[:4])) % 97 == 1
