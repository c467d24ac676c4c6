"""What is said about a finished adapter version: its manifest for machines, its model card for people.

Holds numbers, hashes and settings, never a text of the data set. Knows no model and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.job import HyperParameters


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything needed to say where an adapter came from, and to make it again."""

    label: str
    job: str
    base_model: str
    base_fingerprint: str
    template_sha256: str
    instructions_sha256: str
    data_sha256: str
    rows: dict[str, int]  # train, validation, test, rejected, duplicates
    hyper: HyperParameters
    dropout: float
    steps: int
    tokens: int
    seconds: float
    losses: dict[str, float]  # train_first, train_last, validation after each epoch, test of base and candidate
    judged: dict[str, Any]  # the gate's verdict and its numbers
    target_modules: tuple[str, ...]
    versions: dict[str, str]
    threads: int
    dtype: str
    created: str

    @property
    def seed(self) -> int:
        return self.hyper.seed


def summary(manifest: Manifest) -> str:
    """One paragraph for people."""
    loss = manifest.losses
    return (
        f"{manifest.label} is a LoRA adapter of rank {manifest.hyper.rank} for {manifest.base_model}. It was trained "
        f"on {manifest.rows['train']} conversations for {manifest.hyper.epochs} epochs ({manifest.steps} steps, "
        f"{manifest.tokens} tokens, {manifest.seconds / 60:.1f} minutes). Its mean loss per token of an answer on "
        f"{manifest.rows['test']} conversations that it never saw is {loss['test_candidate']:.3f}; the base model's is "
        f"{loss['test_base']:.3f}."
    )


def model_card(manifest: Manifest) -> str:
    """README.md of the adapter folder, in the form that model hubs read."""
    rows: list[tuple[str, Any]] = [
        ("Base model", f"{manifest.base_model} (fingerprint `{manifest.base_fingerprint[:16]}`)"),
        (
            "Data set",
            f"sha256 `{manifest.data_sha256[:16]}`; " + ", ".join(f"{n} {k}" for k, n in manifest.rows.items()),
        ),
        ("Layers", ", ".join(manifest.target_modules)),
        ("Rank, alpha, dropout", f"{manifest.hyper.rank}, {manifest.hyper.alpha}, {manifest.dropout:g}"),
        ("Learning rate", f"{manifest.hyper.learning_rate:g}, {manifest.hyper.schedule}"),
        ("Rows per step, seed", f"{manifest.hyper.rows_per_step}, {manifest.hyper.seed}"),
        ("Clipping by value, by norm", f"{manifest.hyper.clip_value:g}, {manifest.hyper.clip_norm:g}"),
        ("Verdict", f"{manifest.judged['verdict']}, against {manifest.judged['champion']}"),
        ("Losses", ", ".join(f"{name} {value:.4f}" for name, value in manifest.losses.items())),
        ("Made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("Made at", manifest.created),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    front = "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora]\n---\n"
    return f"{front}\n# {manifest.label}\n\n{summary(manifest)}\n\n| | |\n|---|---|\n{table}\n"
