"""The directions of imports, as rules over the source. `bots -> core <- finetune`; no cycle inside core."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Inside core, a module imports those of its own and of lower levels. engine.protocol, settings and job are values:
# the configuration is made of them, so they stand below it.
LEVELS = (
    {"types", "errors"},
    {"engine.protocol", "job", "sink", "settings", "words", "logs"},
    {"config", "texts", "metrics", "charts", "learned"},
    {
        "commands",
        "help",
        "prompt",
        "engine.scheduler",
        "engine.tally",
        "engine.text",
        "engine.stream",
        "weights",
        "expressions",
        "demo",
        "linear",
    },
    {"engine.scripted"},
    {"model", "engine.*", "store.*", "delivery"},
    {"adapters", "sayings", "datasets", "reply", "retention", "stops", "trainer", "usagefiles"},
    {"operators"},
    {
        "users",
        "feedback",
        "gestures",
        "callers",
        "versions",
        "comparing",
        "importing",
        "tuning",
        "privacy",
        "training",
        "jobboard",
        "jobtexts",
        "lookups",
        "datatexts",
        "lane",
        "checking",
    },
    {"rows"},
    {"service"},
)
# who: what it must not import, not even through others of ours (True) or only itself (False)
FORBIDDEN: dict[str, tuple[set[str], bool]] = {
    "core": ({"bots", "finetune", "aiogram", "slack_bolt", "slack_sdk"}, False),
    "finetune": ({"bots", "core.store", "sqlite3", "sqlite_utils", "aiogram", "slack_bolt", "slack_sdk"}, True),
    "bots": ({"finetune"}, False),
    "bots.terminal.bot": ({"aiogram", "slack_bolt", "slack_sdk", "torch"}, True),
    "bots.terminal.screen": ({"aiogram", "slack_bolt", "slack_sdk", "torch"}, True),
    "core.chat.service": ({"torch"}, True),
    "core.engine.protocol": ({"torch"}, True),
    "core.engine.scheduling.scheduler": ({"torch"}, True),
    "core.engine": ({"aiogram", "slack_bolt", "slack_sdk", "sqlite3", "sqlite_utils", "core.store"}, True),
    "core.model.base": ({"aiogram", "slack_bolt", "slack_sdk", "sqlite3", "sqlite_utils", "core.store"}, True),
}
ONLY_UNDER = {"aiogram": "bots.telegram", "slack_bolt": "bots.slack", "slack_sdk": "bots.slack"}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("core", "bots", "finetune"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """The modules that a file imports; without `lazy` only those of its top level. Type-only imports do not count."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in node.names}
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}
AT_ONCE = {name: imports(path, lazy=False) for name, path in MODULES.items()}


def inside(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def reached(name: str) -> set[str]:
    """All that importing `name` loads, as far as our own files show it."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for imported in AT_ONCE.get(waiting.pop(), set()):
            if imported not in seen:
                seen.add(imported)
                waiting.append(imported)
    return seen


def level(name: str) -> int:
    short = name.removeprefix("core.")
    for number, members in enumerate(LEVELS):
        if short in members:
            return number
    for number, members in enumerate(LEVELS):
        if any(member.endswith(".*") and inside(short, member[:-2]) for member in members):
            return number
    raise AssertionError(f"{name} stands on no level: give it one in LEVELS")


CORE = [name for name in MODULES if name.startswith("core.") and MODULES[name].name != "__init__.py"]


@pytest.mark.parametrize("name", CORE)
def test_core_imports_only_from_its_own_and_lower_levels(name):
    above = {other for other in IMPORTS[name] if other in CORE and level(other) > level(name)}
    assert not above


def test_there_is_no_cycle():
    cycles = {name for name in MODULES if name in reached(name)}
    assert not cycles


@pytest.mark.parametrize("group", FORBIDDEN)
def test_nobody_imports_what_is_not_theirs(group):
    forbidden, through_others = FORBIDDEN[group]
    for name in (name for name in MODULES if inside(name, group)):
        seen = IMPORTS[name] | (reached(name) if through_others else set())
        assert not {one for one in seen if any(inside(one, other) for other in forbidden)}, name


@pytest.mark.parametrize("library", ONLY_UNDER)
def test_a_platforms_library_is_imported_in_its_own_folder_only(library):
    users = {name for name, seen in IMPORTS.items() if any(inside(one, library) for one in seen)}
    assert all(inside(name, ONLY_UNDER[library]) for name in users)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_owns(name):
    source = MODULES[name].read_text(encoding="utf-8")
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), name
