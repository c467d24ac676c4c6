"""64 requests over 8 adapters and the base, arriving at random, against PEFT's `set_adapter` + greedy `generate`.

Each token must be what PEFT draws after the same ids, which by induction makes the answers the same; one forward pass
per answer shows that for all its tokens, where `generate` (see test_exact) would run one per token. Where the oracle's
two best logits differ by less than 1e-4 the other may be drawn: such places are counted, and under 0.1 %.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config.sections import ModelSettings
from core.engine.runtime.loading import load_for_serving
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.core.engine.lora.test_exact import prompts, spy_answers
from tests.support.engine_dialogue import ask, hear, running
from tests.support.tiny import peft_model, save_adapter

pytestmark = pytest.mark.slow

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


async def compare(base: BaseModel, folder: Path, *, std: float, most: int) -> None:
    adapters = [save_adapter(base, folder / f"{i}", seed=i, std=std, **kind) for i, kind in enumerate(KINDS)]
    dice = random.Random(7)
    refs: list[AdapterRef | None] = [[None, *adapters][i % 9] for i in range(REQUESTS)]
    dice.shuffle(refs)
    texts = [f"{i}: " + "tell me about rivers " * dice.randrange(1, 9) for i in range(REQUESTS)]
    ids = prompts(base, texts)
    lengths = [dice.randrange(1, most + 1) for _ in range(REQUESTS)]
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
    with_adapter = peft_model(base, refs)
    for ref, text, prompt, n in zip(refs, texts, ids, lengths, strict=True):
        answer = answers[text]
        assert len(answer) == n or answer[-1] in base.eos_ids, text
        with torch.inference_mode(), with_adapter(ref) as model:
            logits = model(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        best, drawn = logits.amax(1, keepdim=True), logits.gather(1, torch.tensor(answer)[:, None])
        assert bool((best - drawn < TIE).all()), text
        ties += int((drawn < best).sum())
        tokens += len(answer)
    print(f"{tokens} tokens, {ties} ties")
    assert ties <= tokens * 0.001
    assert len({tuple(answer) for answer in answers.values()}) > REQUESTS / 2


async def test_any_request_gets_pefts_text(base: BaseModel, tmp_path: Path) -> None:
    await compare(base, tmp_path, std=0.2, most=24)


@pytest.mark.drill
async def test_any_request_to_the_demo_model_gets_pefts_text(demo_cache: Path, tmp_path: Path) -> None:
    await compare(load_for_serving(ModelSettings(), demo_cache), tmp_path, std=0.02, most=48)
