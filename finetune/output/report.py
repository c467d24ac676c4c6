"""Manifest and model card of a trained version: numbers, hashes and settings, never a text of the data set."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from core.config.sections import HyperParameters
from core.jobs.protocol import Judged, Method, Spec
from finetune.modeling.base import choose_dtype
from finetune.modeling.methods import Trained
from finetune.position import Position
from finetune.prepare import Prepared


@dataclass(frozen=True, slots=True)
class Manifest:
    """Provenance of a version, sufficient to reproduce it."""

    label: str
    job: str
    base_model: str
    base_fingerprint: str
    template_sha256: str
    instructions_sha256: str
    data_sha256: str
    rows: dict[str, int]  # train, validation, test, rejected, duplicates
    method: Method
    parameters: int  # trained ones
    processes: int
    hyper: HyperParameters
    dropout: float
    steps: int
    epochs_done: float  # of hyper.epochs, rounded to a tenth
    clipped: float  # fraction of gradient values clipped by value
    kept_step: int  # the published step: lowest validation loss
    tokens: int
    seconds: float
    losses: dict[str, float]  # train_first, train_last, validation after each epoch, test of base and candidate
    judged: dict[str, Any]  # verdict and numbers of the gate
    layers: tuple[str, ...]  # trained ones
    versions: dict[str, str]
    threads: int
    dtype: str
    created: str

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seed": self.hyper.seed}


def manifest_of(
    spec: Spec,
    prepared: Prepared,
    position: Position,
    trained: Trained,
    *,
    dropout: float,
    epochs_done: float,
    losses: dict[str, float],
    judged: Judged,
    processes: int,
) -> Manifest:
    base, parts, report = prepared.base, prepared.split, prepared.report
    return Manifest(
        label=spec.label,
        job=spec.job,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        template_sha256=base.template_sha256,
        instructions_sha256=hashlib.sha256(spec.instructions.encode()).hexdigest(),
        data_sha256=spec.data_sha256,
        rows={
            "train": len(parts.train),
            "validation": len(parts.validation),
            "test": len(parts.test),
            "rejected": report.rejected,
            "duplicates": report.duplicates,
        },
        method=spec.method,
        parameters=sum(parameter.numel() for parameter in trained.parameters),
        processes=processes,
        hyper=spec.hyper,
        dropout=dropout,
        steps=position.step,
        epochs_done=round(epochs_done, 1),
        clipped=position.clipped / max(1, position.step),
        kept_step=position.best,
        tokens=position.tokens,
        seconds=round(position.seconds, 1),
        losses=losses,
        judged=asdict(judged),
        layers=trained.layers,
        versions=versions(),
        threads=spec.threads,
        dtype=str(choose_dtype(spec)).removeprefix("torch."),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def losses_of(position: Position, gate_losses: Mapping[str, float]) -> dict[str, float]:
    """Losses for the manifest: first and last training losses, validation by step, and those of the gate."""
    first, last = position.ends()
    ends = {"train_first": first, "train_last": last}
    validated = {f"validation_{step}": loss for step, loss in sorted(position.validated.items())}
    return {**ends, **validated, **gate_losses}


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def summary(manifest: Manifest) -> str:
    """One paragraph for the model card."""
    loss, count = manifest.losses, f"{manifest.parameters:,} parameters"
    what = {
        "lora": f"a LoRA adapter of rank {manifest.hyper.rank} ({count}) for {manifest.base_model}",
        "full": f"{manifest.base_model} with all its weights ({count}) trained further",
        "scratch": f"a model of {count} from a fresh configuration",
    }
    return (
        f"{manifest.label} is {what[manifest.method]}. It was trained "
        f"on {manifest.rows['train']} conversations for {manifest.epochs_done:g} of {manifest.hyper.epochs} epochs "
        f"({manifest.steps} steps, {manifest.tokens} tokens, {manifest.seconds / 60:.1f} minutes). Its mean loss per "
        f"token of an answer on {manifest.rows['test']} conversations that it never saw is "
        f"{loss['test_candidate']:.3f}; the base model's is {loss['test_base']:.3f}."
    )


def model_card(manifest: Manifest) -> str:
    """README.md with the metadata that model hubs read."""
    rows: list[tuple[str, Any]] = [
        ("Base model", f"{manifest.base_model} (fingerprint `{manifest.base_fingerprint}`)"),
        ("Template, instructions", f"sha256 `{manifest.template_sha256}`, `{manifest.instructions_sha256}`"),
        (
            "Data set",
            f"sha256 `{manifest.data_sha256}`; " + ", ".join(f"{n} {k}" for k, n in manifest.rows.items()),
        ),
        ("Layers", ", ".join(manifest.layers)),
        ("Rank, alpha", f"{manifest.hyper.rank}, {manifest.hyper.alpha}" if manifest.method == "lora" else "none"),
        ("Dropout, weight decay", f"{manifest.dropout:g}, {manifest.hyper.weight_decay:g}"),
        ("Learning rate", f"{manifest.hyper.learning_rate:g}, {manifest.hyper.schedule}"),
        ("Weights of", f"step {manifest.kept_step} of {manifest.steps}, the best on the validation rows"),
        ("Rows per step, seed", f"{manifest.hyper.rows_per_step}, {manifest.hyper.seed}"),
        (
            "Clipping by value, by norm",
            f"{manifest.hyper.clip_value:g} (which touched {manifest.clipped:.2%}), {manifest.hyper.clip_norm:g}",
        ),
        ("Verdict", f"{manifest.judged['verdict']}, against {manifest.judged['champion']}"),
        ("Losses", ", ".join(f"{name} {value:.4f}" for name, value in manifest.losses.items())),
        ("Made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("Made at", manifest.created),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    library, tag = ("peft", "lora") if manifest.method == "lora" else ("transformers", "sft")
    front = f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags: [{tag}]\n---\n"
    return f"{front}\n# {manifest.label}\n\n{summary(manifest)}\n\n| | |\n|---|---|\n{table}\n"
