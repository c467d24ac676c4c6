"""TRL's SFTTrainer on the rows of a job folder, one epoch: float32, no checkpointing, LoRA on all linear layers."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """From the end of the first step, which warms, to the end of the last."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.ended = time.perf_counter()
        self.began = self.began or self.ended


class Counting(SFTTrainer):
    """Counts the tokens of each batch without its padding."""

    counted: list[int]

    def training_step(self, model, inputs, *rest):
        self.counted.append(int(inputs["attention_mask"].sum()))
        return super().training_step(model, inputs, *rest)


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    spec = json.loads((folder / "spec.json").read_text())
    hyper = spec["hyper"]
    torch.set_num_threads(spec["threads"])
    lines = (folder / "data.jsonl").read_text().splitlines()
    rows = [json.loads(lines[number - 1]) for number in json.loads((folder / "trained-lines.json").read_text())]
    conversations = [
        {
            "prompt": [{"role": "user", "content": row["q"]}],
            "completion": [{"role": "assistant", "content": row["a"]}],
        }
        for row in rows
    ]
    more = {"train_sampling_strategy": "group_by_length"} if name == "trl_grouped" else {}
    config = SFTConfig(
        output_dir=str(folder / name),
        per_device_train_batch_size=hyper["rows_per_step"],
        num_train_epochs=1,
        learning_rate=hyper["learning_rate"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    clock = Clock()
    trainer = Counting(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(conversations),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=LoraConfig(
            r=hyper["rank"], lora_alpha=hyper["alpha"], lora_dropout=hyper["dropout"], target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )  # fmt: skip
    trainer.counted = []
    trainer.train()
    counted = trainer.counted
    answer = {
        "tokens": sum(counted[1:]),
        "all_tokens": sum(counted),
        "seconds": clock.ended - clock.began,
        "steps": len(counted) - 1,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print("@" + json.dumps(answer))


if __name__ == "__main__":
    main()
