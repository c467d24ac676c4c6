"""The table [bots.NAME] of a Telegram bot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from core.config.keys import Listen, host_and_port, key
from core.config.loader import read_table


@dataclass(frozen=True, slots=True)
class TelegramSettings:
    """One Telegram bot. A `webhook` URL takes the place of long polling."""

    token: str = key(
        "",
        "bot token from @BotFather",
        secret=True,
        pattern=r"[0-9]{3,}:[A-Za-z0-9_-]{20,}",
        shape="123456:ABC-DEF..., as @BotFather gave it",
        example="env:TELEGRAM_TOKEN",
    )
    transport: Literal["draft", "edit", "draft_direct", "off"] = key(
        "draft", "how an answer is shown while it is generated"
    )
    rich: bool = key(False, "answers with tables or formulas as rich messages")
    webhook: str = key(
        "",
        "address at which Telegram finds this machine, instead of long polling",
        pattern=r"(https?://[^\s?#]+)?",
        shape="https://bot.example.org/telegram",
    )
    webhook_secret: str = key(
        "",
        "secret of the webhook; with webhook only",
        secret=True,
        pattern=r"([A-Za-z0-9_-]{16,256})?",
        shape="16 to 256 of A-Z a-z 0-9 _ -",
        example="env:TELEGRAM_SECRET",
    )
    listen: Listen = key("127.0.0.1:8081", "host:port that the webhook is served at", min_length=1)
    api: str = key(
        "https://api.telegram.org",
        "address of the Bot API",
        pattern=r"https?://[^\s?#]+",
        shape="https://api.telegram.org",
    )

    @property
    def host_and_port(self) -> tuple[str, int]:
        return host_and_port(self.listen)


def read_settings(given: Mapping[str, object]) -> TelegramSettings:
    """Raises BadConfig naming every key that is unknown, missing or wrong; never the value of a secret."""
    missing = []
    if "token" not in given:
        missing.append("bots.telegram.token is missing: it is what @BotFather gave you")
    if given.get("webhook") and not given.get("webhook_secret"):
        missing.append("bots.telegram.webhook_secret is missing: without it anyone could speak in Telegram's name")
    return read_table(TelegramSettings, "bots.telegram", given, *missing)
