"""Run by the interpreter that has TRL: python trl_adapter.py BASE DATA OUT [key=value of LoraConfig as JSON ...].

SFTTrainer as its documentation shows it: a LoRA adapter on questions and answers, with its checkpoints, into OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    base, data, out = sys.argv[1:4]
    more = {key: json.loads(value) for key, _, value in (one.partition("=") for one in sys.argv[4:])}
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    conversations = [
        {"prompt": [{"role": "user", "content": row["q"]}], "completion": [{"role": "assistant", "content": row["a"]}]}
        for row in rows
    ]
    config = SFTConfig(
        output_dir=out,
        per_device_train_batch_size=8,
        num_train_epochs=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(conversations),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **more}),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
