"""Personal data that is found, and what only looks like it."""

from __future__ import annotations

import pytest

from finetune.data.personal import KINDS, find, redact


def test_each_kind_is_found_once_and_as_nothing_else() -> None:
    for text, kind in [
        ("Write to ana.lopez+shop@mail.example.org.", "mail"),
        ("请写信到 info@example.cn 联系", "mail"),
        ("Card 4111 1111 1111 1111, please", "card"),  # the test number of card processors
        ("Card 5500-0000-0000-0004", "card"),
        ("IBAN DE89 3704 0044 0532 0130 00", "iban"),  # ECBS's example
        ("GB82WEST12345698765432", "iban"),  # ISO 13616's example
        ("Ring +34 976 123 456 after nine", "phone"),
        ("Ring (555) 010-9999", "phone"),
        ("电话 13800138000", "phone"),
        ("Ring 555-234-9999.", "phone"),
        ("请拨打电话13800138000联系我", "phone"),
        ("电话138-0013-8000", "phone"),
        ("电话+8613812345678转", "phone"),  # its digits fulfil Luhn's sum
        ("邮箱zhang@example.cn联系", "mail"),
        ("账号DE89370400440532013000转账", "iban"),
        ("密钥sk-abcdefghijklmnopqrstuvwx完", "token"),
        ("토큰은 ghp_" + "a" * 36 + "입니다", "token"),
        ("the bot is 110201543:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw1", "token"),
        ("xoxb-" + "1234567890-abcdef", "token"),
    ]:
        assert find(text) == {kind: 1}


def test_what_only_looks_like_it_is_left_alone() -> None:
    for text in [
        "4111 1111 1111 1112 fails Luhn's sum",
        "DE88 3704 0044 0532 0130 00 fails mod 97",
        "In 2024-11-24 10:00:00 it was 1,234,567.89 euros",
        "version 10.4.19041.1234 at 192.168.100.200",
        "@handle and user@localhost",
        "order 0000000000000000",
        "150 m²: 400 000-580 000 SEK",
        "",
    ]:
        assert not find(text)


def test_what_stands_before_it_in_chinese_is_left():
    assert redact("我的邮箱zhang@example.cn，电话13800138000。") == ("我的邮箱[mail]，电话[phone]。", 2)


def test_several_are_counted():
    assert find("a@b.org, c@d.org; +34 976 123 456") == {"mail": 2, "phone": 1}


@pytest.mark.timeout(60)
def test_a_hostile_line_takes_no_more_time_than_its_length() -> None:
    """A whole line of the largest size: a pattern that backtracks would take hours."""
    for text in [
        "+12345678901" * 5_000,
        "a@b.org" * 9_000,
        "1 " * 32_000,
        "a" * 64_000 + "@",
        "+1" * 32_000,
        "AB12 " * 13_000,
        "a.@" * 21_000,
        "555-234-" * 8_000,
    ]:
        assert isinstance(find(text), dict)


def test_every_kind_has_its_sentence():
    from core.i18n.messages import say

    for language in ("en", "zh"):
        assert all("3" in say(language, f"data.personal_{kind}", n=3, line=7) for kind in KINDS)
