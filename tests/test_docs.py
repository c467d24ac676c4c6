"""The documents agree with the code: generated tables and example, links, and the functions that ARCHITECTURE.md names.

`python -m tests.test_docs` (make docs) writes what is generated anew.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from bots.cli.main import distributary
from bots.slack.settings import SlackSettings
from bots.telegram.settings import TelegramSettings
from bots.terminal.bot import TerminalSettings
from tests.support.documents import command_table, configuration_table, example_toml
from tests.support.paths import ROOT

BOT_TABLES = {"telegram": TelegramSettings, "slack": SlackSettings, "terminal": TerminalSettings}
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
    *sorted(ROOT.glob(".github/**/*.md")),
]


def command_line_table() -> str:
    rows = (f"| `distributary {name}` | {command.get_short_help_str(200)} |" for name, command in _subcommands())
    return "\n".join(["| command | what it does |", "|---|---|", *rows]) + "\n"


def _subcommands():
    for name, command in distributary.commands.items():
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {word}", one) for word, one in inner.items()) if inner else [(name, command)]


TABLES = {
    "commands": command_table,
    "configuration": lambda: configuration_table(BOT_TABLES),
    "command-line": command_line_table,
}


def current(file: Path) -> str:
    """The document with its generated tables made anew."""
    text = file.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table().strip()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def generated() -> dict[Path, str]:
    made = {
        ROOT / "deploy" / "docs" / f"{name}.md": current(ROOT / "deploy" / "docs" / f"{name}.md") for name in TABLES
    }
    return {**made, ROOT / "deploy" / "config.example.toml": example_toml(BOT_TABLES)}


def test_what_is_generated_is_current() -> None:
    for file, text in generated().items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run make docs"


def test_the_functions_that_architecture_names_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d+\. `([\w.]+)`", text, flags=re.MULTILINE)
    for heading in ("A message", "A data set"):
        section = text.split(f"\n## {heading}")[1].split("\n## ")[0]
        assert 5 <= len(re.findall(r"^\d+\. `", section, flags=re.MULTILINE)) <= 12, heading
    for step in steps:
        assert _is_defined(step), step


def _is_defined(path: str) -> bool:
    """Whether module.function or module.Class.method is defined there. Parsed, not imported: torch takes seconds."""
    words = path.split(".")
    at = next((n for n in range(len(words) - 1, 0, -1) if ROOT.joinpath(*words[:n]).with_suffix(".py").is_file()), 0)
    if not at:
        return False
    node: ast.AST = ast.parse(ROOT.joinpath(*words[:at]).with_suffix(".py").read_text(encoding="utf-8"))
    for word in words[at:]:
        inside = (one for one in ast.iter_child_nodes(node) if getattr(one, "name", "") == word)
        found = next(inside, None)
        if found is None:
            return False
        node = found
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def test_links_and_paths_in_documents_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
        if document.name != "CHANGELOG.md":
            for path in re.findall(r"`((?:core|bots|finetune|tests|deploy)/[\w./-]*\w/?)`", text):
                assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_log_events_in_documents_are_logged() -> None:
    source = "".join(
        path.read_text(encoding="utf-8") for path in (*ROOT.glob("core/**/*.py"), *ROOT.glob("bots/**/*.py"))
    )
    for document in (ROOT / "deploy").glob("*.md"):
        text = document.read_text(encoding="utf-8")
        for line in re.findall(r"^\| log (.*?) \|", text, flags=re.MULTILINE):
            for event in re.findall(r"`([\w.]+)`", line):
                assert f'"{event}"' in source, f"{document.name}: {event}"


def test_the_lock_pins_what_constraints_pin() -> None:
    pins = {name: _pins(ROOT / name) for name in ("constraints.txt", "requirements.lock")}
    locked = pins["requirements.lock"]
    assert {name: pins["constraints.txt"].get(name, locked[name]) for name in locked} == locked, "run: make lock"
    assert "://" not in (ROOT / "requirements.lock").read_text(encoding="utf-8")


def _pins(file: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([\w.]+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[._]", "-", name.lower()): version for name, version in found}


if __name__ == "__main__":
    for made, content in generated().items():
        made.write_text(content, encoding="utf-8")
