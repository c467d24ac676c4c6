"""What a new user does first, with the real demo model: `make run` with a question and /usage piped into it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


def chat(home: Path, text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bots", "--home", str(home), "chat"]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home: Path) -> subprocess.CompletedProcess[str]:
    return chat(home, "What is the capital of France?\n/usage\n")


def test_the_first_start_answers_with_paris_and_counts_its_tokens(first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stderr
    answer, usage = first.stdout.split("\n", 1)
    assert "Paris" in answer
    counts = re.search(r"(\d+) tokens in, (\d+) out", usage)
    assert counts
    assert int(counts[2]) > 3
    assert "ERROR" not in first.stderr
    assert "WARNING" not in first.stderr


def test_the_second_start_knows_the_conversation(home: Path, first: subprocess.CompletedProcess[str]) -> None:
    # another answer to the question of the first start, which may be a long one
    ran = chat(home, "/channel set tokens_out=32\n/retry\n/usage\n")
    assert ran.returncode == 0, ran.stderr
    assert "replies: 2" in ran.stdout


def test_a_model_that_is_cut_is_unpacked_anew(home: Path, first: subprocess.CompletedProcess[str]) -> None:
    (weights,) = (home / "models").rglob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1_000_000])
    ran = chat(home, "/new\nWhat is the capital of France?\n")
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout
    assert weights.read_bytes() == whole
