"""One optimiser step, in as many processes as there are: its gradients go to OUT, of the first process.

    torchrun --nproc-per-node 2 -m tests.support.finetune_one_step OUT JOBDIR [JOBDIR ...]

A folder whose name begins with "sharded" is trained with its blocks sharded.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file

from core.jobs.protocol import Spec
from finetune.prepare import prepare
from finetune.process_group import SHARDED, ProcessGroup, is_shard, whole
from finetune.training.train import Trainer


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    if folder.name.startswith("sharded"):
        os.environ[SHARDED] = "true"
    else:
        os.environ.pop(SHARDED, None)
    torch.set_num_threads(1)
    spec = Spec.read(folder)
    group = ProcessGroup(spec.device)
    with group.first():
        prepared = prepare(folder, spec, lambda event: None)
    trainer = Trainer(folder, spec, prepared, lambda event: None, threading.Event(), group)
    taken = trainer.take_step()
    found = {name: whole(p.grad).clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    shards = sum(is_shard(parameter) for parameter in trainer.parameters)
    return {**found, "loss": torch.tensor([taken.loss, taken.grad_norm, taken.clipped, taken.tokens, shards])}


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        found = gradients(folder)
        if os.environ.get("RANK", "0") == "0":
            save_file(found, out / f"{folder.name}.safetensors")


if __name__ == "__main__":
    main()
