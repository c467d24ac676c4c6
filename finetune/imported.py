"""Evaluates an adapter trained elsewhere (TRL, Axolotl, Unsloth: any PEFT folder) with the same gate as one of our own.

The adapter is loaded by the serving engine's reader and published byte for byte in JOBDIR/out, with a manifest.
"""

import hashlib
import json
import re
import shutil
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from core.engine.lora.adapter_files import CONFIG, WEIGHTS
from core.errors import AdapterUnusable, JobError
from core.i18n.messages import say
from core.jobs.protocol import Evaluated, Spec, Warned
from finetune import settings
from finetune.evaluation.evaluator import Evaluation, Evaluator
from finetune.evaluation.retention_set import NOTHING, own_answers
from finetune.evaluation.row_losses import RowLosses
from finetune.modeling.base import load_module
from finetune.modeling.loss import Scorer
from finetune.modeling.methods import LoraDelta
from finetune.output.publish import done, publish, published
from finetune.output.report import versions
from finetune.prepare import Emit, Prepared, prepare
from finetune.training.checkpoints import Interrupted

_MOST_NAMED = 100
_PACKED = re.compile(r"(-unsloth|-bnb|-[48]bit|-gptq|-awq|-bf16|-fp16|-int[48])+$")


def judge_imported(folder: Path, spec: Spec, emit: Emit, stop: threading.Event) -> None:
    """Evaluate JOBDIR/candidate and publish it. Raises Interrupted, JobError, BadDataset."""
    if said := published(folder):
        for event in said:
            emit(event)
        return
    if not spec.candidate:
        raise JobError(detail=f"{folder}/spec.json names no candidate")
    began = time.monotonic()
    torch.set_num_threads(spec.threads)
    prepared = prepare(folder, spec, emit)

    def check_stop() -> None:
        if stop.is_set():
            raise Interrupted

    def warn(key: str, **fields: object) -> None:
        emit(Warned(say(spec.language, f"data.warn_{key}", **fields)))

    def tell(event: Evaluated) -> None:
        emit(event)

    model = load_module(prepared.base, spec)
    cache = Path(spec.cache) if spec.cache else None
    own = (
        own_answers(folder, cache, prepared.base, spec.instructions, model, check_stop, emit)
        if spec.ability
        else NOTHING
    )
    trained = LoraDelta(model, rank=1, alpha=1, dropout=0.0, rslora=False)  # layers to load the candidate into
    micro = settings.resolve(spec, rows=len(prepared.encoded), device=spec.device).micro_tokens
    row_losses = RowLosses(
        Scorer(model), torch.device(spec.device), prefix=0, micro_tokens=micro, check_stop=check_stop
    )
    candidate = folder / spec.candidate
    try:
        carrying = trained.version(candidate, prepared.base.fingerprint)
    except AdapterUnusable as error:
        raise settings.refused("unfit_adapter", reason=error.fields.get("reason", error.detail)) from error
    if named := _other_base(candidate, prepared.base.name):
        warn("other_base", named=named, base=prepared.base.name)
    evaluation = Evaluator(folder, spec, prepared, own, trained, row_losses, warn).evaluate(lambda: carrying, tell)
    emit(evaluation.judged)
    seconds = time.monotonic() - began
    losses = {"train_first": 0.0, "train_last": 0.0, **evaluation.losses}
    manifest = _manifest(spec, prepared, candidate, evaluation, losses, seconds)

    def copy(out: Path) -> None:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(candidate / name, out / name)

    publish(folder, copy, manifest, _card(manifest))
    emit(done(0, seconds, losses))


def _other_base(candidate: Path, base: str) -> str:
    """The base model named in the adapter's configuration if it is another model (quantised or not), else ""."""
    named = json.loads((candidate / CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip("/ ") or _plain(named) == _plain(base):
        return ""
    return named[:_MOST_NAMED]


def _plain(name: str) -> str:
    """The name without owner and quantisation: org/Name-bnb-4bit -> name."""
    plain = name.rstrip("/ ").rpartition("/")[2].lower()
    return _PACKED.sub("", plain)


def _manifest(
    spec: Spec, prepared: Prepared, candidate: Path, evaluation: Evaluation, losses: dict[str, float], seconds: float
) -> dict[str, Any]:
    config = json.loads((candidate / CONFIG).read_text("utf-8"))
    parts, base = prepared.split, prepared.base
    return {
        "label": spec.label,
        "job": spec.job,
        "imported": True,
        "base_model": base.name,
        "base_fingerprint": base.fingerprint,
        "template_sha256": base.template_sha256,
        "instructions_sha256": hashlib.sha256(spec.instructions.encode()).hexdigest(),
        "data_sha256": spec.data_sha256,
        "rows": {"train": 0, "validation": 0, "test": len(parts.test)},
        "hyper": {"rank": config["r"], "alpha": config["lora_alpha"]},
        "dropout": config.get("lora_dropout", 0.0),
        "made_by": str(config.get("peft_version") or "")[:40],
        "steps": 0,
        "seconds": round(seconds, 1),
        "losses": losses,
        "judged": asdict(evaluation.judged),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _card(manifest: dict[str, Any]) -> str:
    judged, losses = manifest["judged"], manifest["losses"]
    front = "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora]\n---\n"
    return (
        f"{front}\n# {manifest['label']}\n\nA LoRA adapter of rank {manifest['hyper']['rank']} for "
        f"{manifest['base_model']}, trained elsewhere. On {judged['rows']} conversations of the data set "
        f"`{manifest['data_sha256'][:16]}` its mean loss per token of an answer is {losses['test_candidate']:.3f}; the "
        f"base model's is {losses['test_base']:.3f}. Verdict: {judged['verdict']}, against {judged['champion']}.\n"
    )
