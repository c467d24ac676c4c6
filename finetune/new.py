"""`python -m finetune new JOBDIR`: makes a job folder from a model and a data file."""

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from core import files
from core.config.keys import keys, refused
from core.config.sections import PRESETS, HyperParameters
from core.errors import JobError
from core.i18n.messages import Refusal
from core.jobs.protocol import Fresh, Method, Spec
from core.model.weights import fingerprint
from finetune import settings

FRESH, KNOWN = keys(Fresh), keys(HyperParameters)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=Path, metavar="JOBDIR", help="the folder to make")
    parser.add_argument("--model", type=Path, required=True, help="the folder of the model to begin from")
    parser.add_argument("--data", type=Path, required=True, help="JSONL or CSV; with scratch also .txt or .md")
    parser.add_argument("--method", choices=get_args(Method), default="lora", help="a delta, all weights, a new model")
    parser.add_argument("--name", default="", help="what the result is called")
    parser.add_argument("--instructions", default="", help="the system turn that rows without one stand under")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.epilog = f"then KEY=VALUE of [finetune]: {', '.join(KNOWN)}; with scratch also {', '.join(FRESH)}"


def make(given: argparse.Namespace, words: Sequence[str]) -> Path:
    """Write the job folder. Raises JobError naming what is wrong."""
    chosen = _settings(words, scratch=given.method == "scratch")
    preset = str(chosen.get("preset", "auto"))
    hyper = {**PRESETS.get(preset, {}), **{name: value for name, value in chosen.items() if name not in FRESH}}
    try:
        data_sha256 = files.sha256(given.data)
    except OSError as error:
        raise JobError(detail=f"--data {given.data} cannot be read: {error.strerror}") from error
    try:
        found = fingerprint(given.model)
    except (OSError, ValueError) as error:
        raise JobError(detail=f"--model {given.model} is not the folder of a model: {error}") from error
    name = given.name or given.job.absolute().name
    spec = Spec(
        job=name,
        model=str(given.model.absolute()),
        fingerprint=found,
        data="data" + "".join(given.data.suffixes[-2:]),
        data_sha256=data_sha256,
        label=name,
        instructions=given.instructions,
        device=given.device,
        dtype=given.dtype,
        threads=given.threads,
        nice=0,
        hyper=HyperParameters(**hyper),
        method=given.method,
        fresh=Fresh(**{name: value for name, value in chosen.items() if name in FRESH}),
        ability=given.method != "scratch",
    )
    settings.check(spec)
    if (given.job / "spec.json").exists():
        raise JobError(detail=f"{given.job} is a job already: python -m finetune train {given.job} goes on with it")
    try:
        given.job.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given.data, given.job / spec.data)
        spec.write(given.job)
    except OSError as error:
        raise JobError(detail=f"{given.job} cannot be made: {error.strerror or error}; name another folder") from error
    return Path(given.job)


def _settings(words: Iterable[str], *, scratch: bool) -> dict[str, Any]:
    """KEY=VALUE, each as its type. Raises JobError."""
    found: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or (name not in KNOWN and name not in FRESH):
            raise JobError(detail=f"{word!r} is not KEY=VALUE; the keys are {', '.join([*KNOWN, *FRESH])}")
        if name in FRESH and not scratch:
            raise JobError(detail=f"{word} is for a new model: leave it out, or add --method scratch")
        one = FRESH[name] if name in FRESH else KNOWN[name]
        try:
            found[name] = one.parse(text)
        except Refusal as refusal:
            raise JobError(detail=refused(one, text, refusal).render("en")) from None
    return found
