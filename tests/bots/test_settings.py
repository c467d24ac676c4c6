"""The tables of the bots: every wrong or missing key is named with what it must be, and no secret is shown."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from bots.app import load_all
from bots.slack import settings as slack
from bots.telegram import settings as telegram
from bots.terminal import bot as terminal
from core.errors import BadConfig

TELEGRAM = {"token": "123456:ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
SLACK = {"token": "xoxb-1-abcdef", "app_token": "xapp-1-ABC-def"}
WRONG: tuple[tuple[object, Mapping[str, object], tuple[str, ...]], ...] = (
    (slack, {}, ("app_token", "signing_secret", "client_id")),
    (slack, {"app_token": "xapp-1-ABC-def"}, ("needs token", "client_id")),
    (slack, {**SLACK, "token": "nonsense"}, ("bots.slack.token = ***", "xoxb-")),
    (slack, {**SLACK, "tokn": "x"}, ("bots.slack.tokn is unknown", "did you mean token?")),
    (slack, {"client_id": "1.2", "signing_secret": "s"}, ("client_secret is missing", "url is missing")),
    (slack, {**SLACK, "transport": "edits", "listen": "8082"}, ("stream, edit", "did you mean edit?", "host:port")),
    (telegram, {}, ("bots.telegram.token is missing", "@BotFather")),
    (telegram, {"token": "nonsense"}, ("bots.telegram.token = ***", "123456:ABC-DEF")),
    (telegram, {**TELEGRAM, "rich": "yes", "listen": "a:99999"}, ("rich", "true or false", "host:port")),
    (telegram, {**TELEGRAM, "webhook": "https://x.example"}, ("webhook_secret is missing",)),
    (telegram, {**TELEGRAM, "webhook": "x", "api": ""}, ("bots.telegram.webhook", "https://", "bots.telegram.api")),
    (terminal, {"plaice": "x", "user": 3}, ("plaice is unknown; [bots.terminal] has place", "user = 3")),
    (terminal, {"language": "klingon"}, ("bots.terminal.language", "en, zh")),
)


def test_every_mistake_of_a_table_is_named() -> None:
    for bot, given, named in WRONG:
        with pytest.raises(BadConfig) as caught:
            bot.read_settings(given)  # type: ignore[attr-defined]
        told = str(caught.value.fields["problems"])
        assert all(part in told for part in named), told
        assert "nonsense" not in told


def test_what_is_right_is_read() -> None:
    assert slack.read_settings(SLACK).host_and_port == ("127.0.0.1", 8082)
    assert telegram.read_settings({**TELEGRAM, "listen": "[::1]:80"}).host_and_port == ("::1", 80)
    assert terminal.read_settings({"language": "zh-Hans"}).language == "zh"


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        "[engine]\nkind = 'remot'\n[finetune]\nmax_tokens = 200000\n[bots.kim]\nkind = 'telegram'\ntoken = 'nonsense'\n"
        "[bots.telegramm]\n[bots.slack]\ntoken = 'env:NO_SUCH'\n"
    )
    with pytest.raises(BadConfig) as caught:
        load_all(file, {})
    told = caught.value.detail.splitlines()[1:]
    starts = ("bots.slack.token", "finetune.max_tokens", "engine.kind", "bots.kim.token = ***", "[bots.telegramm]")
    assert [line.strip().startswith(start) for line, start in zip(told, starts, strict=True)] == [True] * 5, told
    assert "did you mean remote?" in told[2]
    assert "did you mean telegram?" in told[4]
