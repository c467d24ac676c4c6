"""What a new user does first, with the real demo model: `make run` with a question and /usage piped into it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first")


def chat(home: Path, text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bots", "--home", str(home), "chat"]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_first_start_answers_with_paris_and_counts_its_tokens(home: Path) -> None:
    ran = chat(home, "What is the capital of France?\n/usage\n")
    assert ran.returncode == 0, ran.stderr
    answer, usage = ran.stdout.split("\n", 1)
    assert "Paris" in answer
    counts = re.search(r"(\d+) tokens in, (\d+) out", usage)
    assert counts
    assert int(counts[2]) > 3
    assert ran.stderr == ""


def test_the_second_start_knows_the_conversation(home: Path) -> None:
    ran = chat(home, "/usage\n/retry\n")
    assert ran.returncode == 0, ran.stderr
    assert "1 replies" in ran.stdout
    assert "Paris" in ran.stdout


def test_nothing_that_is_half_unpacked_is_used(home: Path) -> None:
    (model,) = (home / "models").iterdir()
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    ran = chat(home, "/new\nWhat is the capital of France?\n")
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout
