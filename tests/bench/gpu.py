"""How fast the engine serves on a GPU, next to `generate` and PEFT's mixed batch in the same run, on random weights.

    python -m tests.bench.gpu --device cuda --json FILE

64 tokens in, 64 out; tokens/s = generated tokens / wall time from the first submit to the last token, prefill
included; warmed, best of three rounds, cases interleaved. The floor of one row is its weights' bytes by the measured
bandwidth. With `--device cpu` it runs a tiny shape over the same static steps, to show that it still runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from core.config.sections import EngineSettings, ModelSettings
from core.engine.local import LocalEngine
from core.engine.lora.slots import linear_shapes
from core.engine.protocol import Delta, Request, Scope
from core.engine.runtime import attention, loop
from core.engine.runtime.runner import Runner
from core.model.base import BaseModel
from core.model.chat_format import render
from core.types import AdapterRef, Message, Role, Sampling
from tests.core.engine.lora.test_exact import spy_answers
from tests.support.tiny import quietly, tiny_tokenizer

TOKENS, ROUNDS, RANK = 64, 3, 8
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "initializer_range": 0.3,
    },
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "initializer_range": 0.042,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "initializer_range": 0.02,
    },
}  # fmt: skip


@dataclass
class Result:
    """One case: tokens per second of each round, and the ids of the last one."""

    rates: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return max(self.rates)


def make(shape: str, device: torch.device) -> BaseModel:
    """A model of random weights, created on the device."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    module.generation_config.eos_token_id = None  # every answer has 64 tokens
    return BaseModel(
        name=shape, module=module.eval().requires_grad_(False), tokenizer=tiny_tokenizer(), folder=Path(shape),
        device=device, dtype=dtype, context=2048, eos_ids=frozenset(), fingerprint=shape, template_sha256="",
        description=f"{device}, {dtype}",
    )  # fmt: skip


def make_adapter(model: BaseModel, folder: Path, seed: int) -> AdapterRef:
    """Rank 8 on all linear layers but the head, random, in PEFT's format."""
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, size) in linear_shapes(model.module).items():
        if name != "lm_head":
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, size, generator=dice) * size**-0.5
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=dice) * 0.02
    folder.mkdir()
    save_file({name: tensor.to(model.dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return AdapterRef(sha256=f"{seed:064d}", folder=folder, label=f"a{seed}@1")


def bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads."""
    block = torch.ones(2**30 if device.type == "cuda" else 2**26, device=device)
    best = 0.0
    for _ in range(6):
        began = _now(device)
        block.sum()
        best = max(best, block.nbytes / (_now(device) - began))
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Bench:
    """One model with its adapters, our engine over it, and the peers over the same weights."""

    def __init__(self, model: BaseModel, refs: list[AdapterRef], rows: int) -> None:
        self.model, self.refs = model, refs
        self.texts = [self._text(row) for row in range(rows)]
        self.ids = [list(render([Message(Role.USER, text)], model.tokenizer, 1024).ids) for text in self.texts]
        self.results: dict[str, Result] = {}

    def _text(self, row: int) -> str:
        text = f"Number {row}:"
        while (missing := TOKENS - len(render([Message(Role.USER, text)], self.model.tokenizer, 1024).ids)) > 0:
            text += " river"[:missing]
        return text

    async def run(self, rounds: int) -> dict[str, Any]:
        rows, adapters = len(self.texts), len(self.refs)
        loop.Runner = partial(Runner, static=True)  # as on a GPU
        bounds = EngineSettings(max_rows=rows, max_context=512, adapters_in_memory=adapters + 1)
        async with LocalEngine(ModelSettings(), bounds, Path(), model=self.model) as engine:
            self.answers = spy_answers(engine)
            generate: Any = self.model.module
            for number in range(rounds + 1):  # the first one warms up
                for count in (1, rows):
                    await self._ours(f"ours_base_{count}", engine, count, 0, number)
                    self._peer(f"generate_{count}", generate, count, 0, number)
            peft = self._peft()
            for number in range(rounds + 1):
                await self._ours(f"ours_mixed_{rows}x{adapters}", engine, rows, adapters, number)
                self._peer(f"peft_mixed_{rows}x{adapters}", peft, rows, adapters, number)
            steps = engine.thread.runner.steps
            graphs = {"used": False} if steps is None else {"used": steps.usable, "captured": len(steps.graphs)}
        return self.report(graphs)

    async def _ours(self, name: str, engine: LocalEngine, rows: int, adapters: int, number: int) -> None:
        gaps: list[float] = []

        async def one(row: int) -> None:
            request = Request(
                id=f"{name} {row}",
                messages=(Message(Role.USER, self.texts[row]),),
                sampling=Sampling(max_tokens=TOKENS),
                adapter=self.refs[row % adapters] if adapters else None,
                scope=Scope(partner=str(row), channel=str(row)),
            )
            last = 0.0
            async for event in engine.submit(request):
                if isinstance(event, Delta):
                    now = time.perf_counter()
                    gaps.extend([now - last] if last else [])
                    last = now

        self.answers.clear()
        began = _now(self.model.device)
        await asyncio.gather(*(one(row) for row in range(rows)))
        seconds = _now(self.model.device) - began
        self._add(name, rows, seconds, [self.answers[f"{name} {row}"] for row in range(rows)], gaps, number)

    def _peft(self) -> Any:
        from peft import PeftModel

        make: Callable[[], Any] = lambda: PeftModel.from_pretrained(  # noqa: E731
            self.model.module, self.refs[0].folder, adapter_name=self.refs[0].label
        )
        peft = quietly(make)
        for ref in self.refs[1:]:
            peft.load_adapter(ref.folder, adapter_name=ref.label)
        return peft.eval()

    def _peer(self, name: str, peer: Any, rows: int, adapters: int, number: int) -> None:
        """One static batch, greedy, as documented: `generate`, with PEFT's `adapter_names` if there are adapters."""
        module: Any = self.model.module
        module.set_attn_implementation("sdpa")
        names = {"adapter_names": [self.refs[row % adapters].label for row in range(rows)]} if adapters else {}
        ids = torch.tensor(self.ids[:rows], device=self.model.device)
        began = _now(self.model.device)
        with torch.inference_mode():
            out = peer.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                do_sample=False, pad_token_id=0, **names,
            )  # fmt: skip
        seconds = _now(self.model.device) - began
        module.set_attn_implementation(attention.NAME)
        self._add(name, rows, seconds, out[:, ids.shape[1] :].tolist(), [], number)

    def _add(self, name: str, rows: int, seconds: float, ids: list[list[int]], gaps: list[float], number: int) -> None:
        rate = round(rows * TOKENS / seconds, 1)
        sys.stderr.write(f"{self.model.name}, round {number}: {name} {rate} tokens/s\n")
        assert all(len(one) == TOKENS for one in ids)
        if number:
            result = self.results.setdefault(name, Result())
            result.rates.append(rate)
            result.ids, result.gaps = ids, sorted(gaps)

    def report(self, graphs: dict[str, Any]) -> dict[str, Any]:
        rows, adapters = len(self.texts), len(self.refs)
        read = bandwidth(self.model.device)
        best = {name: result.best for name, result in self.results.items()}
        mixed, peft = f"ours_mixed_{rows}x{adapters}", f"peft_mixed_{rows}x{adapters}"
        floor = read / weight_bytes(self.model)
        gaps = self.results["ours_base_1"].gaps
        return {
            "device": torch.cuda.get_device_name(self.model.device) if self.model.device.type == "cuda" else "cpu",
            "dtype": str(self.model.dtype),
            "bandwidth_gb_s": round(read / 1e9, 1),
            "floor_tokens_per_s": round(floor, 1),
            "graphs": graphs,
            "tokens_per_s": {name: result.rates for name, result in self.results.items()},
            "ratios": {
                "fraction_of_floor_1": round(best["ours_base_1"] / floor, 3),
                "fraction_of_floor_1_step": round(1 / gaps[len(gaps) // 2] / floor, 3) if gaps else None,
                "base_1_vs_generate": round(best["ours_base_1"] / best["generate_1"], 2),
                f"base_{rows}_vs_generate": round(best[f"ours_base_{rows}"] / best[f"generate_{rows}"], 2),
                f"mixed_{rows}x{adapters}_vs_peft": round(best[mixed] / best[peft], 2),
                f"lora_tax_{rows}x{adapters}": round(1 - best[mixed] / best[f"ours_base_{rows}"], 3),
            },
            "equal_tokens": {  # up to the first difference, after which texts diverge
                "base_vs_generate": equal(self.results[f"ours_base_{rows}"], self.results[f"generate_{rows}"]),
                "mixed_vs_peft": equal(self.results[mixed], self.results[peft]),
            },
        }


def weight_bytes(model: BaseModel) -> int:
    """Bytes that a decode step must read: all weights, embeddings only if they are the head."""
    module: Any = model.module
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    embedding = module.get_input_embeddings().weight
    base = [parameter for name, parameter in module.named_parameters() if "lora_" not in name]
    return sum(one.nbytes for one in base) - (0 if tied else embedding.nbytes)


def equal(ours: Result, theirs: Result) -> float:
    """Share of tokens before each row's first difference."""
    shared = 0
    for mine, other in zip(ours.ids, theirs.ids, strict=True):
        shared += next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return round(shared / sum(map(len, ours.ids)), 4)


def measure(shape: str, device: torch.device, *, rows: int, adapters: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = make(shape, device)
        refs = [make_adapter(model, Path(folder) / f"a{i}", i) for i in range(adapters)]
        return asyncio.run(Bench(model, refs, rows).run(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, help="default: both large ones on a GPU, else tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu runs a tiny shape")
    wanted = given.shapes or (["smollm2", "llama-3.1-8b"] if device.type == "cuda" else ["tiny"])
    warnings.simplefilter("ignore", UserWarning)
    found = {}
    for shape in wanted:
        found[shape] = measure(shape, device, rows=given.rows, adapters=given.adapters, rounds=given.rounds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    text = json.dumps(found, indent=2)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
