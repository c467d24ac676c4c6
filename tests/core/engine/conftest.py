"""Tiny models, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.model.base import BaseModel
from core.model.demo import demo_folder
from core.types import AdapterRef
from tests.support.engine_contract import Subject
from tests.support.engine_vllm import RANK, Vllm, running
from tests.support.tiny import load_tiny, save_adapter


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Different ranks, scales and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(base, folder / "plain", seed=1, r=4, lora_alpha=8),
        save_adapter(base, folder / "wide", seed=2, r=16, lora_alpha=8, use_rslora=True),
        save_adapter(base, folder / "narrow", seed=3, r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"]),
        save_adapter(
            base,
            folder / "patterned",
            seed=4,
            r=8,
            lora_alpha=8,
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
            alpha_pattern={"down_proj": 24},
        ),
    ]


@pytest.fixture(scope="session")
def vllm_server(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """For drills: the real vLLM with the demo model, started once."""
    with running(demo_folder(demo_cache), tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.fixture(scope="session")
def demo_adapters(vllm_server: Vllm, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Adapters of the demo model that vLLM is not started with."""
    folder = tmp_path_factory.mktemp("demo-adapters")
    return [
        save_adapter(vllm_server.folder, folder / "plain", seed=1, std=0.1, r=RANK, lora_alpha=RANK),
        save_adapter(vllm_server.folder, folder / "narrow", seed=2, std=0.1, r=2, lora_alpha=4, use_rslora=True),
        save_adapter(vllm_server.folder, folder / "few", seed=3, std=0.1, r=4, target_modules=["q_proj", "v_proj"]),
    ]


@pytest.fixture
def vllm(vllm_server: Vllm, demo_adapters: list[AdapterRef]) -> Subject:
    return vllm_server.subject(demo_adapters)
