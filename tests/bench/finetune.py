"""How fast a fine-tune is, next to TRL in the same run: the same model, rows, rank, rows per step, dropout, threads.

    python -m tests.bench.finetune --json FILE [--rows 180] [--threads 2]

One epoch over rows of the company's questions, in real (unpadded) tokens per second, after a step that warms; each side
in a fresh process. TRL's SFTTrainer runs in float32 without checkpointing, all else as it comes, and once more with
`group_by_length`. Ours runs first and last, and the slower of the two counts.
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

from core.demo import demo_folder
from core.job import HyperParameters, Spec
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
    ("ours_again", "ours_finetune", lambda: Path(sys.executable)),
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


def measure(rows: int, threads: int) -> dict[str, Any]:
    sides: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(Path(folder), rows, threads)
        for name, module, python in SIDES:
            try:
                sides[name] = run(job, name, module, python, threads)
            except (Missing, subprocess.SubprocessError) as error:
                missing[name] = str(error)
    ours = [sides[name] for name in ("ours", "ours_again") if name in sides]
    ratios, memory = {}, {}
    for peer in ("trl", "trl_grouped"):
        if peer in sides and ours:
            more = (
                sides[peer]["all_tokens"] - ours[0]["tokens"]
            )  # the newline after each row's end token, as TRL has it
            assert 0 <= more <= ours[0]["rows"], "both sides must train on the same tokens"
            ratios[f"vs_{peer}"] = round(min(o["tokens_per_s"] for o in ours) / sides[peer]["tokens_per_s"], 2)
            memory[f"vs_{peer}"] = round(max(o["peak_mib"] for o in ours) / sides[peer]["peak_mib"], 2)
    return {"ratios": ratios, "memory": memory, "sides": sides, "missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=180)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    text = json.dumps(measure(given.rows, given.threads), indent=2)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
