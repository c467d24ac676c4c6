"""README tells what the code does: its tables are made from the code. `python -m tests.test_docs` mends them."""

from __future__ import annotations

import re
from pathlib import Path

from core.commands.help import table_markdown
from core.config.loader import config_table_markdown

README = Path(__file__).parents[1] / "README.md"
TABLES = {"commands": table_markdown, "configuration": config_table_markdown}


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
