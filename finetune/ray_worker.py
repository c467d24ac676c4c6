"""The entry for Ray's TorchTrainer; ray itself is the caller's. Knows a worker's life, and nothing of training.

    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from finetune.ray_worker import train_func

    TorchTrainer(train_func, train_loop_config={"job": JOBDIR}, scaling_config=ScalingConfig(num_workers=4)).fit()

JOBDIR is a folder that all workers see. A lost worker costs the steps since the last checkpoint: fit again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.jobs.protocol import Done, JobEvent, Progress, Spec, dump_event
from finetune.training.train import train


def train_func(config: Mapping[str, Any]) -> None:
    """Do the job of config["job"], or the rest of it. Raises JobError, BadDataset: Ray counts them as failures."""
    from ray.train import report

    folder = Path(config["job"])
    numbers: dict[str, float] = {}

    def hear(event: JobEvent) -> None:
        if isinstance(event, Done):
            numbers.update(steps=event.steps, seconds=event.seconds, train_loss=event.train_loss_last)
            numbers.update(test_loss=event.test_loss or 0.0, test_loss_base=event.test_loss_base or 0.0)
        if not isinstance(event, Progress):
            with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(dump_event(event) + "\n")

    train(folder, Spec.read(folder), hear, threading.Event())
    report(numbers)  # every worker once, since Ray waits for all of them
