"""64 requests over 8 adapters and the base, arriving at random, against PEFT's `set_adapter` + `generate` one by one.

Equal token for token, except where the oracle's two best logits differ by less than 1e-4: counted, under 0.1 %.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from core.engine.protocol import ModelSettings
from core.model import BaseModel, load_model
from core.types import AdapterRef
from tests.engine.dialogue import ask, hear, running
from tests.engine.test_exact import prompts, spy_answers
from tests.tiny import peft_answers, quietly, save_adapter

REQUESTS = 64
TIE = 1e-4
KINDS: list[dict[str, Any]] = [
    {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 8, "use_rslora": True},
    {"r": 8, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 24}},
    {"r": 8, "lora_alpha": 16, "target_modules": ["down_proj"]},
    {"r": 16, "lora_alpha": 16, "layers_to_transform": [0]},
    {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj", "up_proj"]},
    {"r": 32, "lora_alpha": 16},
]


def margin(base: BaseModel, ref: AdapterRef | None, ids: list[int]) -> float:
    """How far the oracle's two best logits are apart after these ids."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base.folder).eval()
    if ref is not None:
        model = quietly(partial(PeftModel.from_pretrained, model, model_id=ref.folder)).eval()
    with torch.inference_mode():
        best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


async def compare(base: BaseModel, folder: Path, *, std: float, most: int) -> None:
    adapters = [save_adapter(base, folder / f"{i}", seed=i, std=std, **kind) for i, kind in enumerate(KINDS)]
    dice = random.Random(7)
    refs: list[AdapterRef | None] = [[None, *adapters][i % 9] for i in range(REQUESTS)]
    dice.shuffle(refs)
    texts = [f"{i}: " + "tell me about rivers " * dice.randrange(1, 9) for i in range(REQUESTS)]
    ids = prompts(base, texts)
    lengths = [dice.randrange(1, most + 1) for _ in range(REQUESTS)]
    expected = [answer[:n] for answer, n in zip(peft_answers(base, refs, ids, most), lengths, strict=True)]
    async with running(base, max_rows=12) as engine:
        engine.thread.chunk = 50
        answers = spy_answers(engine)
        tasks = []
        async with asyncio.TaskGroup() as group:
            for ref, text, n in zip(refs, texts, lengths, strict=True):
                tasks.append(
                    group.create_task(hear(engine.submit(ask(text, adapter=ref, max_tokens=n, deadline_s=600))))
                )
                await asyncio.sleep(dice.random() * 0.02)
    ties, tokens = 0, 0
    for ref, text, prompt, right in zip(refs, texts, ids, expected, strict=True):
        found = answers[text]
        tokens += len(right)
        if found != right:
            at = next((i for i, pair in enumerate(zip(found, right, strict=False)) if pair[0] != pair[1]), -1)
            assert at >= 0, f"{text}: one of them ends early"
            assert margin(base, ref, [*prompt, *right[:at]]) < TIE, text
            ties += 1
    print(f"{tokens} tokens, {ties} ties")
    assert ties <= tokens * 0.001
    assert len({tuple(answer) for answer in expected}) > REQUESTS / 2


async def test_any_request_says_what_peft_says(base: BaseModel, tmp_path: Path) -> None:
    await compare(base, tmp_path, std=0.2, most=24)


@pytest.mark.drill
async def test_any_request_to_the_demo_model_says_what_peft_says(demo_cache: Path, tmp_path: Path) -> None:
    await compare(load_model(ModelSettings(), demo_cache), tmp_path, std=0.02, most=48)
