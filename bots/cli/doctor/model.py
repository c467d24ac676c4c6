"""Checks of the model: its files on this machine, and the model server of the remote engine."""

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from bots.cli.doctor.findings import Finding, Level, Setup
from core import files
from core.config.sections import RemoteSettings
from core.errors import AppError, ModelLoadFailed
from core.model import demo
from core.model.folder import TOKENIZER_FILES, check_folder, has_weights


def model(setup: Setup) -> Iterator[Finding]:
    """The files that `model.name` needs: config.json, a tokenizer, and weights unless the engine is remote."""
    config = setup.config
    if config is None or config.engine.kind == "scripted":
        return
    name, local = config.model.name, Path(config.model.name).expanduser()
    if name == "demo":
        yield _demo_model(setup)
    elif local.is_file():
        yield setup.finding(Level.BAD, "model", "model_is_file", name=name)
    elif (local / "config.json").is_file():
        yield _model_folder(setup, name, local, weights=config.engine.kind == "local")
    elif local.exists() or name.startswith((".", "/", "~")):
        yield setup.finding(Level.BAD, "model", "model_no_folder", name=name)
    elif _in_hub_cache(name, config.model.revision):
        yield setup.finding(Level.GOOD, "model", "model_there", name=name)
    else:
        yield setup.finding(Level.WARNING, "model", "model_download", name=name)


def _model_folder(setup: Setup, name: str, folder: Path, *, weights: bool) -> Finding:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return setup.finding(Level.BAD, "model", "model_no_tokenizer", name=name)
    try:
        if weights and not has_weights(folder):
            return setup.finding(Level.BAD, "model", "model_no_weights", name=name)
        check_folder(folder, weights=weights)
    except ModelLoadFailed as error:
        return setup.finding(Level.BAD, "model", "model_unfit", error=error.detail)
    return setup.finding(Level.GOOD, "model", "model_there", name=name)


def _demo_model(setup: Setup) -> Finding:
    if demo.is_whole(setup.home.models / demo.FOLDER):
        return setup.finding(Level.GOOD, "model", "model_there", name=demo.TITLE)
    package = find_spec(demo.PACKAGE)
    if package is None or package.origin is None:
        return setup.finding(Level.BAD, "model", "model_no_package", name=demo.TITLE, install=demo.INSTALL)
    file = Path(package.origin).parent / demo.SOURCE_FILE
    if not file.is_file() or files.sha256(file) != demo.SOURCE_SHA256:
        return setup.finding(Level.BAD, "model", "model_damaged", path=str(file), install=demo.INSTALL)
    return setup.finding(Level.GOOD, "model", "model_unpack", name=demo.TITLE)


def _in_hub_cache(name: str, revision: str) -> bool:
    if find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision or None), str)
    except ValueError:  # not an id of the hub
        return False


def server(setup: Setup) -> Iterator[Finding]:
    """The model server of the remote engine: the only check that uses the network."""
    if setup.config is None or setup.config.engine.kind != "remote":
        return
    engine = setup.config.engine
    url = urlsplit(engine.url)
    if url.scheme == "http" and not is_private(url.hostname or ""):
        yield setup.finding(Level.WARNING, "server", "server_open", host=url.hostname or "")
    try:
        yield asyncio.run(_ask_server(setup, engine))
    except AppError as error:
        yield setup.finding(Level.BAD, "server", "server_bad", error=error.detail or str(error))


async def _ask_server(setup: Setup, settings: RemoteSettings) -> Finding:
    from core.engine.openai.client import OpenAIServer
    from core.engine.openai.preflight import find_base

    server = OpenAIServer(settings)
    try:
        await server.check_health()
        models = await server.models()
        base = find_base(server, models, settings.model_there)
        loads = await server.loads_adapters()
    finally:
        await server.close()
    level, key = (Level.GOOD, "server_good") if loads else (Level.WARNING, "server_loads_none")
    count = sum(model.parent == base.id for model in models)
    return setup.finding(level, "server", key, server=server.address, model=base.id, context=base.context, count=count)


def is_private(host: str) -> bool:
    """Whether requests to this host stay on this machine or in a private network. Names are not resolved."""
    try:
        return ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan", ".svc", ".localhost"))
