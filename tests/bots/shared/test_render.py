"""Cutting and closing text: nothing lost, nothing over the limit, no grapheme torn."""

from __future__ import annotations

import regex
from hypothesis import given
from hypothesis import strategies as st

from bots.shared.render import closed_blocks, misleads, plain, printable, split_text

PIECES = st.sampled_from(
    [
        *"ab Zé.!?\n\t，。！「」中文字",
        "\n\n",
        "\r\n",
        ". ",
        "e\u0301\u0323",
        "👩‍👩‍👧‍👦",
        "👍🏽",
        "🇸🇪",
        "❤️",
        "각",
        "\u1100\u1161\u11a8",
        "นำ",
        "1\ufe0f\u20e3",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    ]
)
TEXT = st.lists(PIECES, max_size=120).map("".join)
LINES = [
    *("# h", "text", "- a", "- b", "  c", "1. x", "2. y", "```", "```py", "> q", "---", "===", "    code"),
    *("**b**", "~~~", "<div>", "</div>", "", "more ", "*", "2", "[r]: /u", "[r]"),
]
TABLE = ["|a|b|\n", "|-|-|\n", "|1|2|\n", "more ", "-"]
MARKDOWN = st.lists(st.sampled_from([*(f"{line}\n" for line in LINES), *TABLE]), max_size=25).map("".join)


def utf16(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


@given(TEXT, st.integers(30, 80), st.sampled_from([len, utf16, lambda t: len(t.encode())]))
def test_parts_join_to_the_text_and_keep_within_the_limit(text, limit, measure):
    parts = split_text(text, limit, measure)
    assert "".join(parts) == text
    assert all(measure(part) <= limit for part in parts)
    assert all(parts) or parts == ("",)


@given(TEXT, st.integers(30, 80))
def test_no_grapheme_is_torn(text, limit):
    clusters = regex.findall(r"\X", text)
    starts = {sum(map(len, clusters[:i])) for i in range(len(clusters) + 1)}
    at = 0
    for part in split_text(text, limit):
        if max(map(len, clusters), default=0) <= limit:
            assert at in starts
        at += len(part)


def test_a_paragraph_is_preferred_to_a_sentence_and_a_sentence_to_a_word():
    assert split_text("One two.\n\nThree four. Five", 20) == ("One two.\n\n", "Three four. Five")
    assert split_text("One two three. Four five", 20) == ("One two three. ", "Four five")
    assert split_text("第一句话。第二句话很长", 8) == ("第一句话。", "第二句话很长")
    assert split_text("onetwothreefour", 5) == ("onetw", "othre", "efour")


def test_a_grapheme_longer_than_the_limit_is_cut_all_the_same():
    text = "e" + "\u0301" * 50
    assert "".join(split_text(text, 20)) == text
    assert all(len(part) <= 20 for part in split_text(text, 20))


@given(MARKDOWN, MARKDOWN)
def test_closed_blocks_stay_closed_whatever_follows(text, more):
    closed, tail = closed_blocks(text)
    assert closed + tail == text
    later, _ = closed_blocks(text + more)
    assert later.startswith(closed)


def test_a_block_is_closed_once_another_has_begun():
    assert closed_blocks("One.\n\nTwo.\n") == ("One.\n\n", "Two.\n")
    assert closed_blocks("One.\n\n") == ("", "One.\n\n")
    assert closed_blocks("1. a\n\n2") == ("", "1. a\n\n2")
    assert closed_blocks("```\na\n\nb\n\n") == ("", "```\na\n\nb\n\n")


def test_printable_keeps_text_and_drops_what_steers_a_terminal():
    assert printable("a\x1b[31mb\x07\tc\nd\u200de中") == "a[31mb\tc\nd\u200de中"
    assert printable("\x9b31m\u202egpj\u202c.exe\u2066\u2069") == "31mgpj.exe"


def test_plain_text_keeps_every_line_and_no_markup():
    assert plain("Improving **Acme** · round 2\n\n▓▓░ 61 %  \nloss `2.0`\n\n- [a](b)") == (
        "Improving Acme · round 2\n▓▓░ 61 %\nloss 2.0\na"
    )


def test_a_link_misleads_where_its_text_names_another_host():
    for label, url in (
        ("https://bank.example/login", "https://evil.example/"),
        ("bank.example", "http://bank.example.evil.example"),
        ("www.bank.example", "https://evil.example"),
    ):
        assert misleads(label, url)
    for label, url in (
        ("the bank", "https://evil.example"),
        ("bank.example", "https://www.bank.example/login"),
        ("https://bank.example", "https://BANK.example/a?b"),
        ("e.g. this", "https://a.example"),
    ):
        assert not misleads(label, url)
