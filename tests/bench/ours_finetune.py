"""One epoch of our trainer on a job folder, step by step as `python -m finetune train` takes them."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    from core.jobs.protocol import Spec
    from finetune.__main__ import configure_process, set_up_libraries

    set_up_libraries()
    from finetune.training.train import Trainer, prepare

    folder = Path(sys.argv[1])
    spec = Spec.read(folder)
    configure_process(spec)
    import torch

    torch.set_num_threads(spec.threads)
    prepared = prepare(folder, spec, lambda event: None)
    trainer = Trainer(folder, spec, prepared, lambda event: None, threading.Event())
    lines = [prepared.encoded[number].line for number in prepared.split.train]
    (folder / "trained-lines.json").write_text(json.dumps(lines))
    trainer.take_step()  # warms; the step counts again below
    began = time.perf_counter()
    for step in range(trainer.schedule.steps_per_epoch):
        trainer.position.step = step
        trainer.take_step()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = sum(len(row.ids) for row in trainer.train_rows)
    answer = {"tokens": tokens, "rows": len(trainer.train_rows), "seconds": seconds, "steps": step + 1}
    print("@" + json.dumps(answer | {"peak_mib": round(peak)}))


if __name__ == "__main__":
    main()
