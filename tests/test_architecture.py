"""Directions of imports, as a table of packages; ARCHITECTURE.md draws the same.

Every import counts: at the top, inside a function, for types only.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.support.paths import ROOT

BOTS_LIBRARIES = {"aiogram", "slack_bolt", "slack_sdk"}
STORE = {"sqlite3", "sqlite_utils", "core.storage"}

# package: the packages of ours that it may import, beside itself
ALLOWED: dict[str, str] = {
    "core.types": "",
    "core.errors": "",
    "core.i18n": "",
    "core.files": "core.errors",
    "core.charts": "core.files core.errors",
    "core.config": "core.types core.errors core.i18n",
    "core.platform": "core.types core.errors core.i18n",
    "core.commands": "core.types core.errors core.i18n core.config core.storage",
    "core.storage": "core.types core.errors core.files",
    "core.model": "core.types core.errors core.files core.config",
    "core.engine": "core.types core.errors core.files core.i18n core.config core.model",
    "core.observability": "core.types core.errors core.engine core.storage",
    "core.channels": "core.types core.errors core.i18n core.files core.config core.commands core.storage core.platform"
    " core.usage",
    "core.delivery": "core.types core.errors core.platform core.storage",
    "core.usage": "core.types core.errors core.i18n core.config core.files core.charts core.commands core.storage",
    "core.adapters": "core.types core.errors core.i18n core.files core.config core.model core.commands core.storage"
    " core.channels",
    "core.privacy": "core.types core.errors core.i18n core.files core.config core.commands core.storage core.channels",
    "core.jobs": "core.types core.errors core.i18n core.files core.charts core.config core.platform core.model"
    " core.commands core.storage core.engine core.observability core.channels core.delivery core.usage core.adapters"
    " core.privacy",
    "core.chat": "core.types core.errors core.i18n core.files core.config core.platform core.model core.commands"
    " core.storage core.engine core.observability core.channels core.delivery core.usage core.adapters core.privacy"
    " core.jobs",
    "finetune": "core.types core.errors core.i18n core.files core.config core.jobs core.model core.engine",
    "bots.shared": "core.types core.errors core.i18n core.config core.commands core.platform",
    "bots.telegram": "core.types core.errors core.i18n core.config core.commands core.platform bots.shared",
    "bots.slack": "core.types core.errors core.i18n core.config core.commands core.observability core.platform"
    " bots.shared",
    "bots.terminal": "core.types core.errors core.i18n core.config core.commands core.platform bots.shared",
}
# The rest of bots/ builds the program: it may import all of core, and itself.
INSIDE_FINETUNE = "data modeling evaluation output training"  # each may import those before it
# what the trainer may import of two packages that are not its own
OF_JOBS, OF_ENGINE = "core.jobs.protocol", "core.engine.lora"


def modules() -> dict[str, Path]:
    found = {}
    for package in ("core", "bots", "finetune"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """The modules that a file imports; without `everywhere`, those that are loaded with it."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in MODULES else module for a in node.names}
        elif everywhere or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            waiting += ast.iter_child_nodes(node)
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}
LOADED = {name: imports(path, everywhere=False) for name, path in MODULES.items()}


def inside(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def package_of(name: str) -> str:
    """The package of the table that a module belongs to; "" for the parts of bots/ that build the program."""
    return next((package for package in ALLOWED if inside(name, package)), "")


def reached(name: str) -> set[str]:
    """All that importing `name` loads, as far as our own files show it: packages on the way included."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        for imported in LOADED.get(one, set()):
            parents = [imported.rsplit(".", n)[0] for n in range(imported.count(".") + 1)]
            for each in parents:
                if each not in seen:
                    seen.add(each)
                    waiting.append(each)
    return seen


def test_a_package_imports_what_the_table_allows() -> None:
    wrong = []
    for name, seen in IMPORTS.items():
        package = package_of(name)
        if not package:
            continue
        wrong += [
            f"{name} imports {other}"
            for other in sorted(seen & set(MODULES))
            if not inside(other, package) and package_of(other) not in ALLOWED[package].split()
        ]
    assert wrong == []


def test_the_table_names_every_package_and_has_no_cycle() -> None:
    there = {name for name in MODULES if name.startswith("core.") and name.count(".") == 1}
    assert there == {package for package in ALLOWED if package.startswith("core.")}
    graph = {package: set(allowed.split()) for package, allowed in ALLOWED.items()}
    assert list(TopologicalSorter(graph).static_order())


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {other for other in seen if other in MODULES} for name, seen in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_core_and_finetune_stand_below_the_bots() -> None:
    for name, seen in IMPORTS.items():
        if inside(name, "core"):
            forbidden = {"bots", "finetune", *BOTS_LIBRARIES}
        elif inside(name, "finetune"):
            forbidden = {"bots", *BOTS_LIBRARIES, *STORE}
        else:
            forbidden = {"finetune"}
        assert not {one for one in seen for other in forbidden if inside(one, other)}, name


def test_inside_finetune_each_package_imports_those_before_it() -> None:
    order = INSIDE_FINETUNE.split()
    for at, package in enumerate(order):
        later = [f"finetune.{other}" for other in order[at + 1 :]]
        for name in (name for name in MODULES if inside(name, f"finetune.{package}")):
            assert not {one for one in IMPORTS[name] for other in later if inside(one, other)}, name


def test_the_trainer_takes_of_jobs_the_protocol_and_of_the_engine_the_adapter_files() -> None:
    for name in (name for name in MODULES if inside(name, "finetune")):
        for one in IMPORTS[name] & set(MODULES):
            assert not inside(one, "core.jobs") or inside(one, OF_JOBS), f"{name} imports {one}"
            assert not inside(one, "core.engine") or inside(one, OF_ENGINE), f"{name} imports {one}"


def test_a_platforms_library_is_imported_in_its_own_folder_only() -> None:
    for library, folder in (("aiogram", "bots.telegram"), ("slack_bolt", "bots.slack"), ("slack_sdk", "bots.slack")):
        users = {name for name, seen in IMPORTS.items() if any(inside(one, library) for one in seen)}
        assert users, library
        assert all(inside(name, folder) for name in users), library


def test_what_starts_without_a_model_loads_no_torch_and_what_needs_no_store_loads_no_sqlite() -> None:
    for name, forbidden in {
        "core.chat.service": {"torch"},
        "core.engine.protocol": {"torch"},
        "core.engine.scheduling.scheduler": {"torch"},
        "bots.terminal.bot": {"torch", *BOTS_LIBRARIES},
        "core.engine.local": STORE | BOTS_LIBRARIES,
        "core.engine.openai.remote": STORE | BOTS_LIBRARIES,
        "core.model.base": STORE | BOTS_LIBRARIES,
        "finetune.__main__": STORE | BOTS_LIBRARIES,
    }.items():
        loaded = reached(name)
        assert loaded, name
        assert not {one for one in loaded for other in forbidden if inside(one, other)}, name


def test_every_package_opens_with_its_map_and_every_module_with_what_it_holds() -> None:
    for name, path in MODULES.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert text, name
        if path.name == "__init__.py" and path.parent != ROOT / "core" / "engine":
            assert text.count("\n") >= 2, f"{name} has no map of its files"
            files = {one.stem for one in path.parent.glob("*.py")} - {"__init__", "__main__"}
            missing = {one for one in files if one not in text}
            assert not missing, f"{name} does not name {', '.join(sorted(missing))}"


def test_no_file_or_folder_outgrows_its_bounds() -> None:
    for name, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{name} has {lines} lines"
    folders = {path.parent for path in MODULES.values()}
    for folder in folders:
        count = sum(1 for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h"))
        assert count <= 14, f"{folder.relative_to(ROOT)} has {count} files"


def test_no_wait_can_swallow_a_cancellation() -> None:
    """`asyncio.wait_for` of Python 3.11 returns the result where it is cancelled at that moment; `timeout` does not."""
    users = [name for name, path in MODULES.items() if "asyncio.wait_for(" in path.read_text(encoding="utf-8")]
    assert users == []
