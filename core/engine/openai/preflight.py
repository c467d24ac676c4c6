"""Checks before the first request that a server serves our base model and that its usage can be charged.

The server must serve one matching base model, tokenize as our tokenizer does, and answer one prompt of token ids with
usage. Weights cannot be compared from here.
"""

import secrets

from core.config.sections import RemoteSettings
from core.engine.openai.client import OpenAIServer, ServedModel
from core.engine.openai.sse import CompletionRequest
from core.engine.protocol import EngineInfo
from core.errors import ModelLoadFailed
from core.model.base import ModelFiles
from core.types import Sampling

SAMPLE = "The river branches: 3 < 5, 我们在这里。\n\n  def f(x):\treturn x ** 2  # naïve Größe 🐟"


async def check_server(server: OpenAIServer, settings: RemoteSettings, files: ModelFiles) -> tuple[str, EngineInfo]:
    """Check the server; return the base model's id there and the engine's info. Raises AppError with what is wrong."""
    await server.check_health()
    base = find_base(server, await server.models(), settings.model_there)
    info = EngineInfo(
        model=files.name,
        fingerprint=_fingerprint(settings, files),
        description=f"{base.owner or 'server'} at {server.address}",
        context=min(base.context or files.context, settings.max_context),
        folder=files.folder if files.fingerprint else None,
        device=str(files.device),
    )
    ids = files.tokenizer.encode(SAMPLE, add_special_tokens=False)
    if await server.tokenize(base.id, SAMPLE) not in (None, ids):
        raise ModelLoadFailed(
            detail=f"{server} serves {base.id}, whose tokenizer is not that of model.name={files.name}: "
            "they are not the same base model"
        )
    sampling = Sampling(stop=("\n\n\n\n",))  # so that the probe sends every field
    await server.probe(
        CompletionRequest(base.id, tuple(ids[:16]), sampling, 1, tuple(sorted(files.eos_ids)), secrets.token_hex(16))
    )
    return base.id, info


def find_base(server: OpenAIServer, models: list[ServedModel], wanted: str) -> ServedModel:
    """The named base model, or the only one. Raises ModelLoadFailed."""
    bases = [model for model in models if not model.parent]
    found = [model for model in bases if model.id == wanted] if wanted else bases
    if len(found) == 1:
        return found[0]
    there = ", ".join(model.id for model in bases[:10]) or "none"
    problem = f"does not serve engine.model_there={wanted}" if wanted else "does not serve one base model alone"
    raise ModelLoadFailed(detail=f"{server} {problem}; there is {there}: name one in engine.model_there")


def _fingerprint(settings: RemoteSettings, files: ModelFiles) -> str:
    """Fingerprint that adapters must match: of the local weights, else from the configuration."""
    given = settings.fingerprint
    if files.fingerprint and given not in ("", files.fingerprint):
        raise ModelLoadFailed(
            detail=f"engine.fingerprint={given[:12]}, but the weights in {files.folder} are {files.fingerprint[:12]}"
        )
    if not (files.fingerprint or given):
        raise ModelLoadFailed(
            detail=f"{files.folder} holds no weights, so engine.fingerprint must say whose adapters fit: "
            "it is base_fingerprint in the manifest.json of an adapter of this base model"
        )
    return files.fingerprint or given
