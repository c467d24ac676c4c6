"""Writes a job's result to JOBDIR/out: a PEFT adapter or a transformers model, with manifest.json and README.md."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from core import files
from core.errors import JobError
from core.jobs.protocol import Done, JobEvent, Judged, load_event
from finetune.output.report import Manifest

OUT, ASIDE, MANIFEST = "out", "out.new", "manifest.json"
WEIGHTS = "adapter_model.safetensors"


def publish(folder: Path, write: Callable[[Path], None], manifest: Mapping[str, Any], card: str) -> None:
    """Write JOBDIR/out with its manifest and model card: absent, or complete and durable. Raises OSError."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write(aside)
    (aside / "README.md").write_text(card, "utf-8")
    (aside / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, allow_nan=False, indent=2), "utf-8")
    files.move(aside, folder / OUT)


def write_adapter(folder: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """A PEFT adapter."""
    _write_config(folder, manifest)
    (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))


def write_model(folder: Path, model: Any, state: dict[str, Tensor], tokenizer: Any) -> None:
    """A transformers model, for `model.name`."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def published(folder: Path) -> list[JobEvent]:
    """Final events of a job whose `out` exists: the trainer was killed after the rename. Empty otherwise.

    Raises JobError.
    """
    path = folder / OUT / MANIFEST
    if not path.is_file():
        return []
    try:
        manifest = json.loads(path.read_text("utf-8"))
        losses = manifest["losses"]
        judged = load_event(json.dumps({"kind": Judged.kind, **manifest["judged"]}))
        return [judged, done(manifest["steps"], manifest["seconds"], losses)]
    except (ValueError, KeyError, TypeError) as error:
        raise JobError("training.why_damaged", f"{path} is damaged: {error}") from error


def done(steps: int, seconds: float, losses: dict[str, float]) -> Done:
    return Done(
        steps=steps,
        seconds=seconds,
        train_loss_first=losses["train_first"],
        train_loss_last=losses["train_last"],
        test_loss_base=losses["test_base"],
        test_loss=losses["test_candidate"],
    )


def _write_config(folder: Path, manifest: Manifest) -> None:
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=manifest.base_model,
        r=manifest.hyper.rank,
        lora_alpha=manifest.hyper.alpha,
        lora_dropout=manifest.dropout,
        use_rslora=manifest.hyper.rslora,
        target_modules=list(manifest.layers),
        inference_mode=True,
    )
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    known = json.loads(path.read_text("utf-8"))
    known["target_modules"] = sorted(known["target_modules"])  # a set in PEFT: its order would change the file's hash
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", "utf-8")
