"""The README tables and config.example.toml are made from the code; `python -m tests.test_docs` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from bots.slack.settings import SlackSettings
from bots.telegram.settings import TelegramSettings
from bots.terminal.bot import TerminalSettings
from core.commands.help import table_markdown
from core.config.show import config_table_markdown, example_toml

README = Path(__file__).parents[1] / "README.md"
EXAMPLE = Path(__file__).parents[1] / "deploy" / "config.example.toml"
BOT_TABLES = {"telegram": TelegramSettings, "slack": SlackSettings, "terminal": TerminalSettings}
TABLES = {"commands": table_markdown, "configuration": lambda: config_table_markdown(BOT_TABLES)}


def with_current_tables(text: str) -> str:
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table().strip()}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->(?:.*?<!-- /{name} -->)?"
        text = re.sub(pattern, lambda _, block=block: block, text, count=1, flags=re.DOTALL)  # type: ignore[misc]
    return text


def test_the_tables_in_readme_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_current_tables(text) == text, "run: python -m tests.test_docs"


if __name__ == "__main__":
    README.write_text(with_current_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    EXAMPLE.write_text(example_toml(BOT_TABLES), encoding="utf-8")
