"""Which adapter folders are taken, and for what reasons the others are refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.engine.adapter_files import AdapterStore, Base, load_adapter
from core.engine.lora import LoraStacks, shapes
from core.errors import AdapterUnusable
from core.model import BaseModel
from core.types import AdapterRef
from tests.tiny import edit_config, save_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def fits(base: BaseModel) -> Base:
    return Base(base.fingerprint, shapes(base.module))


@pytest.fixture
def copy(adapters: list[AdapterRef], tmp_path: Path) -> AdapterRef:
    """A good adapter that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(adapters[0].folder, folder)
    return AdapterRef("ab" * 32, folder, "copy@1")


def edit_tensors(ref: AdapterRef, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(ref.folder / WEIGHTS)
    change(tensors)
    save_file(tensors, ref.folder / WEIGHTS)


def first(tensors: dict[str, torch.Tensor], side: str = "A") -> str:
    return next(name for name in sorted(tensors) if f"lora_{side}" in name)


def test_a_good_adapter_is_taken_with_its_scale_folded_into_b(copy: AdapterRef, fits: Base) -> None:
    weights = load_adapter(copy, fits)
    raw = load_file(copy.folder / WEIGHTS)
    module = "model.layers.0.self_attn.q_proj"
    a, b = weights.pairs[module]
    assert torch.equal(a, raw[f"base_model.model.{module}.lora_A.weight"])
    assert torch.equal(b, raw[f"base_model.model.{module}.lora_B.weight"] * 2.0)  # alpha 8 / rank 4
    assert (weights.sha256, weights.rank, len(weights.pairs)) == (copy.sha256, 4, 14)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"invented_next_year": True}, "invented_next_year"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"r": 0}, "rank 0"),
        ({"r": 10_000}, "rank 10000"),
        ({"r": True}, "rank True"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"r": 8}, "shape"),
        ({"target_modules": ["q_proj"]}, "target_modules does not name"),
        ({"target_modules": []}, "target_modules does not name"),
        ({"exclude_modules": ["q_proj"]}, "target_modules does not name"),
        ({"layers_to_transform": [0]}, "target_modules does not name"),
    ],
)
def test_configurations_that_would_be_computed_otherwise_are_refused(
    copy: AdapterRef, fits: Base, changes: dict[str, Any], reason: str
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(AdapterUnusable, match=reason) as caught:
        load_adapter(copy, fits)
    assert "copy@1" in caught.value.detail


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(first(t, "B")), "lora_B of .* is missing"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.up_proj" in name], "weights of .* are missing"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "not the A or B"),
        (
            lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": t[first(t)] + 0}),
            "no linear",
        ),
        (lambda t: t.update({first(t): t[first(t)][:, :-1].clone()}), "shape"),
        (lambda t: t[first(t)].view(-1)[3:4].fill_(float("nan")), "not finite"),
        (lambda t: t.update({first(t): t[first(t)].to(torch.int8)}), "int8"),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    copy: AdapterRef, fits: Base, change: Callable[[dict[str, torch.Tensor]], None], reason: str
) -> None:
    edit_tensors(copy, change)
    with pytest.raises(AdapterUnusable, match=reason):
        load_adapter(copy, fits)


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "copy@1"),
        (pickle_instead, "pickled"),
        (lambda folder: (folder / WEIGHTS).unlink(), "missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a table"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "copy@1"),
        (lambda folder: (folder / "adapter_config.json").write_text(" " * 2**21), "larger"),
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "manifest.json").write_text('{"base_fingerprint": "another"}'), "made for the base"),
    ],
)
def test_damaged_folders_are_refused(copy: AdapterRef, fits: Base, damage: Callable[[Path], None], reason: str) -> None:
    damage(copy.folder)
    with pytest.raises(AdapterUnusable, match=reason):
        load_adapter(copy, fits)


def test_a_manifest_for_this_base_is_taken(copy: AdapterRef, fits: Base) -> None:
    (copy.folder / "manifest.json").write_text(json.dumps({"base_fingerprint": fits.fingerprint}))
    load_adapter(copy, fits)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(up|down)_proj"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["up_proj"]},
    ],
)
def test_every_way_that_peft_names_layers_is_read_as_peft_does(
    base: BaseModel, fits: Base, tmp_path: Path, options: dict[str, Any]
) -> None:
    ref = save_adapter(base, tmp_path / "named", seed=1, **options)
    assert load_adapter(ref, fits).pairs


def test_the_store_loads_once_keeps_few_and_forgets_failures(copy: AdapterRef, fits: Base) -> None:
    store = AdapterStore(fits, limit=2)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(store.get(copy))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    bad = AdapterRef("c" * 64, copy.folder / "not there yet", "bad@1")
    with pytest.raises(AdapterUnusable):
        store.get(bad)
    shutil.copytree(copy.folder, bad.folder)
    assert store.get(bad).sha256 == bad.sha256
    for name in "def":
        store.get(AdapterRef(name * 64, copy.folder))
        assert len(store) <= 2
    assert store.get(copy) is not found[0]  # dropped, while who holds it keeps it


def test_slots_are_reused_only_when_nobody_runs_with_them(
    base: BaseModel, adapters: list[AdapterRef], fits: Base
) -> None:
    stacks = LoraStacks(base.module, max_slots=2, device=base.device, dtype=base.dtype)
    a, b, c, _ = (load_adapter(ref, fits) for ref in adapters)
    assert stacks.acquire(a) == stacks.acquire(a) == 0
    assert stacks.acquire(b) == 1
    stacks.release(a.sha256)
    with pytest.raises(AssertionError):
        stacks.acquire(c)
    stacks.release(a.sha256)
    assert stacks.acquire(c) == 0
    assert a.sha256 not in stacks.slots
    for stack in stacks.stacks.values():  # nothing of the wider, former tenant is left
        assert not stack.a[0, c.rank : stacks.rank].any()
        assert not any(b[0, c.rank :].any() for b in stack.b)
