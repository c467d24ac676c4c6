"""The README's tour, as a person would type it: ask, fine-tune on a company's FAQ, promote, ask again, roll back.

    python -m tests.support.tour [--home DIR] [--json FILE]

Twenty questions are held out of training. The figure is the mean token F1 (as in SQuAD: lower case, no punctuation,
no articles) of the channel's answers against the company's, before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import resources
from pathlib import Path

HELD_OUT = 20


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The company's questions and answers: those to train on, and those held out."""
    data = resources.files("zaragoza_construction_faq").joinpath("data/faq-en.jsonl").read_text(encoding="utf-8")
    given = [json.loads(line) for line in data.splitlines() if line.strip()]
    random.Random(2026).shuffle(given)
    return given[HELD_OUT:], given[:HELD_OUT]


def chat(home: Path, *lines: str) -> str:
    """Type these lines into `distributary chat`; what it prints on standard output."""
    ran = subprocess.run(
        [sys.executable, "-m", "bots", "--home", str(home), "chat"],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"status {ran.returncode}: {ran.stderr[-2000:]}")
    return ran.stdout


def answers(home: Path, questions: list[str]) -> list[str]:
    """Each question in a conversation of its own; /new's sentence stands between the answers."""
    from core.i18n.messages import say

    marker = say("en", "users.new")
    lines = [line for question in questions for line in ("/new", question)]
    parts = chat(home, *lines).split(marker)
    assert len(parts) == len(questions) + 1, (len(parts), parts[:2])
    return [part.strip() for part in parts[1:]]


def token_f1(answer: str, reference: str) -> float:
    said, wanted = _tokens(answer), _tokens(reference)
    shared = sum((Counter(said) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _tokens(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def tour(home: Path) -> dict[str, object]:
    train, held_out = rows()
    faq = home / "faq.jsonl"
    home.mkdir(parents=True, exist_ok=True)
    faq.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in train), encoding="utf-8")
    questions = [row["q"] for row in held_out]
    references = [row["a"] for row in held_out]

    began = time.monotonic()
    before = answers(home, questions)
    asked = time.monotonic()
    job = chat(home, f"/finetune {faq} yes")
    trained = time.monotonic()
    promotion = chat(home, "/adapter promote terminal@1")
    after = answers(home, questions)
    rollback = chat(home, "/adapter rollback")
    again = answers(home, questions[:3])
    f1_before = sum(map(token_f1, before, references)) / HELD_OUT
    f1_after = sum(map(token_f1, after, references)) / HELD_OUT
    return {
        "f1_before": round(f1_before, 4),
        "f1_after": round(f1_after, 4),
        "rise": round(f1_after / f1_before - 1, 3),
        "rollback_brings_the_old_answers_back": again == before[:3],
        "minutes_training": round((trained - asked) / 60, 1),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "said": {"job": job, "promotion": promotion, "rollback": rollback},
        "answers": [
            {"question": question, "company": reference, "before": first, "after": second}
            for question, reference, first, second in zip(questions, references, before, after, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="an empty folder; default: a temporary one")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = tour(given.home or Path(folder))
    report = json.dumps(result, indent=2, ensure_ascii=False)
    if given.json:
        given.json.write_text(report, encoding="utf-8")
    sys.stdout.write(report + "\n")
    sys.exit(not (result["rise"] >= 0.5 and result["rollback_brings_the_old_answers_back"]))  # type: ignore[operator]


if __name__ == "__main__":
    main()
