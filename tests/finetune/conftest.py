"""A tiny base model, and job folders for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from core.config.sections import HyperParameters
from core.jobs.protocol import JobEvent, Spec
from tests.support.tiny import save_tiny, tiny_tokenizer

MakeJob = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), initializer_range=0.05)


@pytest.fixture(scope="session")
def taught_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows what rows of `faq` look like, so that there is something to lose."""
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path_factory.mktemp("taught"), initializer_range=0.05)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), tiny_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lines = [json.loads(line) for line in faq(60).splitlines()]
    turns = [[{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}] for row in lines]
    texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in turns]
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    labels = given.input_ids.masked_fill(given.attention_mask == 0, -100)
    for step in range(100):
        rows = slice(step % 6 * 10, step % 6 * 10 + 10)
        model(given.input_ids[rows], attention_mask=given.attention_mask[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


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
    def make(name: str = "job", data: bytes | None = None, *, base: Path = tiny_folder, **hyper: Any) -> Path:
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
            model=str(base),
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
