"""Tiny models, loaded once."""

from __future__ import annotations

import pytest

from core.model import BaseModel
from core.types import AdapterRef
from tests.tiny import load_tiny, save_adapter


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
