"""Entry point for Ray's TorchTrainer. Ray is installed by the caller.

    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from finetune.ray_worker import train_func

    TorchTrainer(train_func, train_loop_config={"job": JOBDIR}, scaling_config=ScalingConfig(num_workers=4)).fit()

JOBDIR is on a file system that all workers share. After a lost worker, `fit` again resumes from the last checkpoint.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.jobs.protocol import Done, JobEvent, Progress, Spec, dump_event
from finetune.training.train import train


def train_func(config: Mapping[str, Any]) -> None:
    """Train config["job"], or resume it. Raises JobError, BadDataset."""
    from ray.train import report

    folder = Path(config["job"])
    numbers: dict[str, float] = {}

    def record(event: JobEvent) -> None:
        if isinstance(event, Done):
            numbers.update(steps=event.steps, seconds=event.seconds, train_loss=event.train_loss_last)
            numbers.update(test_loss=event.test_loss or 0.0, test_loss_base=event.test_loss_base or 0.0)
        if not isinstance(event, Progress):
            with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(dump_event(event) + "\n")

    train(folder, Spec.read(folder), record, threading.Event())
    report(numbers)  # Ray waits for a report of every worker
