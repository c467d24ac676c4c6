"""One engine or peer in a process of its own: loads once, then runs a case per line. Standard library only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spec:
    """What all engines run: the model's folder and GGUF file, adapter folders, prompts as text and as token ids."""

    folder: str
    gguf: str
    adapters: list[str]
    texts: list[str]
    prompts: list[list[int]]
    new_tokens: int
    threads: int


Case = dict[str, Any]  # rows, adapters (how many different ones, row i has i modulo), and what `Run` adds


def serve(make: Callable[[Spec], Callable[[Case], dict[str, Any]]]) -> None:
    """`make` loads the engine; its result runs a case and gives {"seconds": ..., ...}. One JSON line in, one out."""
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    run = make(spec)
    _say({"ready": True})
    for line in sys.stdin:
        _say(run(json.loads(line)))


def _say(values: dict[str, Any]) -> None:
    sys.stdout.write("@" + json.dumps(values) + "\n")
    sys.stdout.flush()
