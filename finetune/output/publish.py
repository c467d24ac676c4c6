"""The job's result, an adapter's folder or a model's: written aside, and renamed to `out` when it is whole.

Any program that loads PEFT adapters, or models of transformers, loads it; manifest.json and README.md say where it
came from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from core.errors import JobError
from core.jobs.protocol import Done, JobEvent, Judged, load_event
from finetune.output.report import Manifest, model_card
from finetune.training.checkpoint import sync_folder, write_durably

OUT, ASIDE, MANIFEST = "out", "out.new", "manifest.json"
WEIGHTS = "adapter_model.safetensors"


def publish(folder: Path, write: Callable[[Path], None], manifest: Manifest) -> None:
    """Write JOBDIR/out. Until the rename nothing of that name exists; afterwards it is complete."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write(aside)
    write_durably(aside / "README.md", model_card(manifest).encode())
    text = json.dumps({**asdict(manifest), "seed": manifest.seed}, ensure_ascii=False, allow_nan=False, indent=2)
    write_durably(aside / MANIFEST, text.encode())
    aside.rename(folder / OUT)
    sync_folder(folder)


def write_adapter(folder: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
    _write_config(folder, manifest)
    write_durably(folder / WEIGHTS, save(tensors, {"format": "pt"}))


def write_model(folder: Path, model: Any, state: dict[str, Tensor], tokenizer: Any) -> None:
    """A folder that `model.name` may name."""
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def published(folder: Path) -> list[JobEvent]:
    """The last events of an `out` that is there already: the trainer was killed after the rename. Else none."""
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
    write_durably(path, (json.dumps(known, indent=2, sort_keys=True) + "\n").encode())
