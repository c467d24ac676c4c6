"""A tiny base model, and job folders for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.job import HyperParameters, JobEvent, Spec
from tests.tiny import save_tiny, tiny_tokenizer

MakeJob = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), initializer_range=0.05)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def faq(rows: int) -> bytes:
    pairs = [{"q": f"What is {i} and {i + 1}?", "a": f"{'It is ' * (i % 5)}{2 * i + 1}."} for i in range(rows)]
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


@pytest.fixture
def make_job(tmp_path: Path, tiny_folder: Path) -> MakeJob:
    def make(name: str = "job", data: bytes | None = None, **hyper: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        content = faq(60) if data is None else data
        (folder / "data.jsonl").write_bytes(content)
        chosen = {
            "rank": 4,
            "alpha": 8,
            "learning_rate": 1e-2,
            "epochs": 2,
            "rows_per_step": 8,
            "rehearsal": 0,
            **hyper,
        }
        Spec(
            job="j1",
            model=str(tiny_folder),
            fingerprint="",
            data="data.jsonl",
            data_sha256=hashlib.sha256(content).hexdigest(),
            label="terminal@1",
            instructions="Be brief.",
            nice=0,
            ability=False,
            hyper=HyperParameters(**chosen),
        ).write(folder)
        return folder

    return make


class Heard(list[JobEvent]):
    """An `emit` that keeps what it was told."""

    def __call__(self, event: JobEvent) -> None:
        self.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]
