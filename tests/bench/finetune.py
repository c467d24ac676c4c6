"""How fast a fine-tune is, next to TRL in the same run: the same model, rows, rank, rows per step, dropout, threads.

    python -m tests.bench.finetune --json FILE [--rows 180] [--threads 2] [--rounds 2]

One epoch over rows of the company's questions, in real (unpadded) tokens per second, after a step that warms; each side
in a fresh process. TRL's SFTTrainer runs in float32 without checkpointing, all else as it comes, and once more with
`group_by_length`. The sides take turns, and of each the best of its rounds counts, for memory the least of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from core.config.sections import HyperParameters
from core.jobs.protocol import Spec
from core.model.demo import demo_folder
from tests.bench import environments
from tests.bench.environments import Missing
from tests.drill.gate import faq

ROWS_PER_STEP = 8  # TRL's own default
RANK, ALPHA, DROPOUT = 16, 32, 0.05
SIDE_S = 900
SIDES: tuple[tuple[str, str, Callable[[], Path]], ...] = (
    ("ours", "ours_finetune", lambda: Path(sys.executable)),
    ("trl", "peer_trl", environments.trl),
    ("trl_grouped", "peer_trl", environments.trl),
)


def prepare(folder: Path, rows: int, threads: int) -> Path:
    """A job folder with the data; ours leaves in it which rows its split trains on, and TRL trains on the same."""
    data = "".join(json.dumps(row) + "\n" for row in random.Random(0).sample(faq("faq-en.jsonl"), rows))
    (folder / "data.jsonl").write_text(data, encoding="utf-8")
    hyper = HyperParameters(
        rank=RANK, alpha=ALPHA, dropout=DROPOUT, rows_per_step=ROWS_PER_STEP, epochs=1, rehearsal=0
    )  # fmt: skip
    model = demo_folder(user_cache_path("distributary") / "bench")
    Spec(
        "bench", str(model), "", "data.jsonl", hashlib.sha256(data.encode()).hexdigest(), "bench@1",
        threads=threads, nice=0, ability=False, hyper=hyper,
    ).write(folder)  # fmt: skip
    return folder


def run(folder: Path, name: str, module: str, python: Callable[[], Path], threads: int) -> dict[str, Any]:
    """What one side measured. Raises Missing."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [str(python()), "-m", f"tests.bench.{module}", str(folder), name]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SIDE_S, env=environment, check=False)
    answer = next((line for line in ran.stdout.splitlines() if line.startswith("@")), None)
    if answer is None:
        raise Missing("; ".join(ran.stderr.strip().splitlines()[-3:]))
    found = dict(json.loads(answer[1:]))
    found["tokens_per_s"] = round(found["tokens"] / found["seconds"], 1)
    sys.stderr.write(f"{name}: {found}\n")
    return found


def measure(rows: int, threads: int, rounds: int) -> dict[str, Any]:
    sides: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), rows, threads)
        for _ in range(rounds):
            for name, module, python in SIDES:
                if name in missing:
                    continue
                try:
                    sides.setdefault(name, []).append(run(job, name, module, python, threads))
                except (Missing, subprocess.SubprocessError) as error:
                    missing[name] = str(error)
    fastest = {name: max(one["tokens_per_s"] for one in found) for name, found in sides.items() if found}
    leanest = {name: min(one["peak_mib"] for one in found) for name, found in sides.items() if found}
    ratios, memory = {}, {}
    for peer in ("trl", "trl_grouped"):
        if peer in fastest and "ours" in fastest:
            ours, theirs = sides["ours"][0], sides[peer][0]
            more = theirs["all_tokens"] - ours["tokens"]  # the newline after each row's end token, as TRL has it
            assert 0 <= more <= ours["rows"], "both sides must train on the same tokens"
            ratios[f"vs_{peer}"] = round(fastest["ours"] / fastest[peer], 2)
            memory[f"vs_{peer}"] = round(leanest["ours"] / leanest[peer], 2)
    return {"ratios": ratios, "memory": memory, "sides": sides, "missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=180)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    text = json.dumps(measure(given.rows, given.threads, given.rounds), indent=2)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
