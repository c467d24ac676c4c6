"""`distributary doctor`: looks at everything that can be wrong before it goes wrong. Changes nothing.

It asks no network, but for the model server that the configuration names.

Each check is a function that gives findings; one that cannot be made is itself a finding.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from bots.app import enabled_bots, key_file
from core.config.schema import Config
from core.config.sections import RemoteSettings
from core.errors import AppError, BadConfig
from core.i18n.messages import say
from core.model import demo
from core.storage.cipher import Cipher
from core.storage.database import Tx, now_ms, open_read_only
from core.storage.home import Home
from core.usage import ledger

_GIB = 2**30
_LITTLE_DISK, _NO_DISK = 5 * _GIB, 1 * _GIB
_LARGE_WAL = 64 * 2**20
_YEARS = range(2026, 2100)


class Level(IntEnum):
    BAD, WARNING, GOOD = range(3)


_SIGNS = {Level.BAD: "✗", Level.WARNING: "!", Level.GOOD: "✓"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is what was looked at; `text` what was found; `action` what to do about it, if anything."""

    level: Level
    name: str
    text: str
    action: str = ""


@dataclass(frozen=True, slots=True)
class Examined:
    """What is examined. `config` is None where it cannot be read; `problem` then says why."""

    home: Home
    config: Config | None
    problem: str = ""
    language: str = "en"

    def say(self, key: str, /, **fields: str | int | float) -> str:
        return say(self.language, f"doctor.{key}", **fields)

    def finding(self, level: Level, what: str, key: str, /, **fields: str | int | float) -> Finding:
        """Of the sentence `key`, and for all but good ones of `key_do`."""
        action = "" if level is Level.GOOD else self.say(f"{key}_do", **fields)
        return Finding(level, self.say(what), self.say(key, **fields), action)


Check = Callable[[Examined], Iterable[Finding]]


def examine(patient: Examined) -> list[Finding]:
    """All findings, worst first."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(patient)
        except Exception as error:  # a check that fails must not hide the others
            findings.append(patient.finding(Level.BAD, "check", "check_failed", check=check.__name__, error=str(error)))
    return sorted(findings, key=lambda finding: finding.level)


def report(findings: Iterable[Finding]) -> str:
    rows = [(f"{_SIGNS[one.level]} {one.name}", one.text, one.action) for one in findings]
    first = max(len(row[0]) for row in rows)
    second = max((len(row[1]) for row in rows if row[2] and len(row[1]) < 70), default=0)
    return "\n".join(f"{a:<{first}}   {b:<{second}}   {c}".rstrip() for a, b, c in rows) + "\n"


def as_json(findings: Iterable[Finding], **more: object) -> str:
    """The same for programs; `more` stands beside the findings."""
    told = [{**asdict(one), "level": one.level.name.lower()} for one in findings]
    return json.dumps({"findings": told, **more}, ensure_ascii=False, indent=2) + "\n"


# --- the checks ---


def _python(patient: Examined) -> Iterator[Finding]:
    level = Level.GOOD if sys.version_info >= (3, 11) else Level.BAD
    yield patient.finding(
        level, "python", "version" if level is Level.GOOD else "python_old", version=platform.python_version()
    )


def _torch(patient: Examined) -> Iterator[Finding]:
    if patient.config and patient.config.engine.kind == "scripted":
        return
    if find_spec("torch") is None:
        yield patient.finding(Level.BAD, "torch", "torch_missing")
        return
    import torch

    wanted = patient.config.model.device if patient.config else "auto"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(wanted.partition(":")[2] or 0)  # of cuda:N
    device = torch.cuda.get_device_name(index) if index < gpus else f"CPU, {os.cpu_count()} cores"
    if wanted.startswith("cuda") and gpus and index >= gpus:
        there = ", ".join(f"cuda:{number}" for number in range(gpus))
        yield patient.finding(Level.BAD, "torch", "no_such_gpu", device=wanted, there=there)
    elif wanted.startswith("cuda") and not gpus:
        yield patient.finding(Level.BAD, "torch", "no_gpu", device=wanted)
    else:
        yield patient.finding(Level.GOOD, "torch", "torch_device", version=torch.__version__, device=device)
        if index >= gpus or wanted == "cpu":
            yield _operators(patient)


def _operators(patient: Examined) -> Finding:
    from core.engine.cpu.compiled import unavailable_reason

    reason = unavailable_reason()
    if reason:
        return patient.finding(Level.WARNING, "operators", "not_compiled", reason=reason.splitlines()[0])
    return patient.finding(Level.GOOD, "operators", "compiled")


def _sqlite(patient: Examined, version: tuple[int, ...] = sqlite3.sqlite_version_info) -> Iterator[Finding]:
    shown = ".".join(map(str, version))
    if has_wal_reset_bug(version):
        yield patient.finding(Level.WARNING, "sqlite", "wal_reset", version=shown)
    else:
        yield patient.finding(Level.GOOD, "sqlite", "version", version=shown)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Source: https://sqlite.org/wal.html#walresetbug, fixed in 3.51.3, 3.50.7 and 3.44.6."""
    mended = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return version >= (3, 7, 0) and not mended


def _home(patient: Examined) -> Iterator[Finding]:
    path = patient.home.path
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        yield patient.finding(Level.BAD, "home", "home_unwritable", path=str(there))
        return
    free = shutil.disk_usage(there).free
    level = Level.BAD if free < _NO_DISK else Level.WARNING if free < _LITTLE_DISK else Level.GOOD
    yield patient.finding(
        level, "disk", "disk_good" if level is Level.GOOD else "disk_low", gib=round(free / _GIB, 1), path=str(there)
    )
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield patient.finding(Level.WARNING, "home", "home_open", path=str(path))
    else:
        yield patient.finding(Level.GOOD, "home", "home_good", path=str(path))


def _clock(patient: Examined) -> Iterator[Finding]:
    now = time.time()
    newest = max((f.stat().st_mtime for f in (patient.home.database, _wal(patient.home)) if f.exists()), default=0.0)
    if time.gmtime(now).tm_year not in _YEARS:
        yield patient.finding(Level.BAD, "clock", "clock_year", year=time.gmtime(now).tm_year)
    elif newest > now + 60:
        yield patient.finding(Level.BAD, "clock", "clock_back", minutes=round((newest - now) / 60))
    else:
        yield patient.finding(
            Level.GOOD, "clock", "clock_good", time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
        )


def _configuration(patient: Examined) -> Iterator[Finding]:
    if patient.config is None:
        for problem in patient.problem.splitlines():
            yield Finding(Level.BAD, patient.say("config"), problem.strip(), patient.say("config_do"))
        return
    where = str(patient.config.file) if patient.config.file else patient.say("config_defaults")
    yield patient.finding(Level.GOOD, "config", "config_read", path=where)
    try:
        bots = enabled_bots(patient.config.bots)
    except BadConfig as error:
        for problem in str(error.fields["problems"]).splitlines():
            yield Finding(Level.BAD, patient.say("bots"), problem.strip(), patient.say("config_do"))
        return
    yield patient.finding(Level.GOOD, "bots", "bots_enabled", names=", ".join(bots) or "-")


def _model(patient: Examined) -> Iterator[Finding]:
    config = patient.config
    if config is None or config.engine.kind == "scripted":
        return
    name, local = config.model.name, Path(config.model.name).expanduser()
    if name == "demo":
        yield _demo_model(patient)
    elif (local / "config.json").is_file():
        yield patient.finding(Level.GOOD, "model", "model_there", name=name)
    elif local.exists() or name.startswith((".", "/", "~")):
        yield patient.finding(Level.BAD, "model", "model_no_folder", name=name)
    elif _in_hub_cache(name, config.model.revision):
        yield patient.finding(Level.GOOD, "model", "model_there", name=name)
    else:
        yield patient.finding(Level.WARNING, "model", "model_download", name=name)


def _server(patient: Examined) -> Iterator[Finding]:
    """The model server of the remote engine."""
    if patient.config is None or patient.config.engine.kind != "remote":
        return
    engine = patient.config.engine
    url = urlsplit(engine.url)
    if url.scheme == "http" and not _is_private(url.hostname or ""):
        yield patient.finding(Level.WARNING, "server", "server_open", host=url.hostname or "")
    try:
        yield asyncio.run(_ask_server(patient, engine))
    except AppError as error:
        yield patient.finding(Level.BAD, "server", "server_bad", error=error.detail or str(error))


async def _ask_server(patient: Examined, settings: RemoteSettings) -> Finding:
    from core.engine.openai.client import OpenAIServer
    from core.engine.openai.preflight import find_base

    server = OpenAIServer(settings)
    try:
        await server.check_health()
        models = await server.models()
        base = find_base(server, models, settings.model_there)
        level = Level.GOOD if await server.loads_adapters() else Level.WARNING
    finally:
        await server.close()
    count = sum(model.parent == base.id for model in models)
    facts: dict[str, str | int | float] = {
        "server": server.address,
        "model": base.id,
        "context": base.context,
        "count": count,
    }
    return patient.finding(level, "server", "server_good" if level is Level.GOOD else "server_loads_none", **facts)


def _is_private(host: str) -> bool:
    """Whether what goes there stays on this machine or in a private network. Names are not looked up."""
    try:
        return ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan", ".svc", ".localhost"))


def _demo_model(patient: Examined) -> Finding:
    if demo.is_whole(patient.home.models / demo.FOLDER):
        return patient.finding(Level.GOOD, "model", "model_there", name=demo.TITLE)
    package = find_spec(demo.PACKAGE)
    if package is None or package.origin is None:
        return patient.finding(Level.BAD, "model", "model_no_package", name=demo.TITLE, install=demo.INSTALL)
    file = Path(package.origin).parent / demo.SOURCE_FILE
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != demo.SOURCE_SHA256:
        return patient.finding(Level.BAD, "model", "model_damaged", path=str(file), install=demo.INSTALL)
    return patient.finding(Level.GOOD, "model", "model_unpack", name=demo.TITLE)


def _in_hub_cache(name: str, revision: str) -> bool:
    if find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision or None), str)
    except ValueError:  # no id at all
        return False


def _key(patient: Examined) -> Iterator[Finding]:
    path = key_file(patient.config or Config(), patient.home)
    if not path.exists():
        if patient.home.database.exists():
            yield patient.finding(Level.BAD, "key", "key_missing", path=str(path))
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield patient.finding(Level.BAD, "key", "key_open", path=str(path), mode=f"{mode:04o}")
    else:
        yield patient.finding(Level.GOOD, "key", "key_good", path=str(path))


def _database(patient: Examined) -> Iterator[Finding]:
    path = patient.home.database
    if not path.exists():
        return
    wal = _wal(patient.home).stat().st_size if _wal(patient.home).exists() else 0
    if wal > _LARGE_WAL:
        yield patient.finding(Level.WARNING, "database", "wal_large", mib=wal // 2**20)
    try:
        cipher = Cipher.open(key_file(patient.config or Config(), patient.home), create=False)
        connection = open_read_only(path)
        try:
            import sqlite_utils

            connection.execute("BEGIN")
            broken = ledger.check(Tx(sqlite_utils.Database(connection, execute_plugins=False), cipher, now_ms()))
        finally:
            connection.close()
    except (sqlite3.Error, AppError) as error:
        yield patient.finding(Level.BAD, "database", "database_unreadable", error=str(error))
        return
    for rule in broken:
        yield patient.finding(Level.BAD, "books", "books_broken", rule=rule)
    if not broken:
        yield patient.finding(Level.GOOD, "books", "books_good", mib=round(path.stat().st_size / 2**20, 1))


def _wal(home: Home) -> Path:
    return home.database.with_name(home.database.name + "-wal")


CHECKS: tuple[Check, ...] = (_configuration, _home, _key, _database, _model, _server, _torch, _sqlite, _python, _clock)
