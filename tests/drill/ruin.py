"""An adapter trained with a learning rate of 1.0 that nothing stops, as JOBDIR/candidate: what the gate must refuse.

python -m tests.drill.ruin JOBDIR
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file

from core.jobs.protocol import Spec
from finetune.prepare import prepare
from finetune.training.train import Trainer, Unstable

STEPS = 8


def main() -> None:
    folder = Path(sys.argv[1])
    spec = Spec.read(folder)
    wild = replace(spec, candidate="", hyper=replace(spec.hyper, learning_rate=1.0, clip_value=0, clip_norm=0))
    torch.set_num_threads(spec.threads)
    prepared = prepare(folder, wild, lambda event: None)
    aside = folder / "ruining"
    aside.mkdir(exist_ok=True)
    trainer = Trainer(aside, wild, prepared, lambda event: None, threading.Event())
    for step in range(STEPS):
        trainer.position.step = step
        try:
            trainer.take_step()
        except Unstable:  # what was ruined before is enough
            break
    out = folder / "candidate"
    out.mkdir(exist_ok=True)
    save_file(trainer.trained.tensors(), out / "adapter_model.safetensors")
    LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=wild.hyper.rank, lora_alpha=wild.hyper.alpha,
        target_modules=list(trainer.trained.layers),
    ).save_pretrained(out)  # fmt: skip


if __name__ == "__main__":
    main()
