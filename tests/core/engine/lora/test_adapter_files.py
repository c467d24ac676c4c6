"""Which adapter folders load, and why others are refused; the store and the slots of loaded ones."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.engine.lora.adapter_files import (
    MAX_READS,
    AdapterStore,
    AdapterTarget,
    AdapterWeights,
    _by_pattern,
    load_adapter,
)
from core.engine.lora.layers import StackedLora
from core.engine.lora.slots import AdapterSlots, linear_shapes
from core.engine.runtime.runner import Runner
from core.errors import AdapterUnusable
from core.i18n.messages import Lazy
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.support.tiny import edit_config, quietly, save_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def fits(base: BaseModel) -> AdapterTarget:
    return AdapterTarget(base.fingerprint, linear_shapes(base.module))


@pytest.fixture
def fresh(adapters: list[AdapterRef], tmp_path: Path) -> Callable[[], AdapterRef]:
    """Returns another copy of a good adapter at each call."""
    numbers = itertools.count()

    def copied() -> AdapterRef:
        folder = tmp_path / f"copy{next(numbers)}"
        shutil.copytree(adapters[0].folder, folder)
        return AdapterRef("ab" * 32, folder, "copy@1")

    return copied


@pytest.fixture
def copy(fresh: Callable[[], AdapterRef]) -> AdapterRef:
    return fresh()


def edit_tensors(ref: AdapterRef, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(ref.folder / WEIGHTS)
    change(tensors)
    save_file(tensors, ref.folder / WEIGHTS)


def first(tensors: dict[str, torch.Tensor], side: str = "A") -> str:
    return next(name for name in sorted(tensors) if f"lora_{side}" in name)


def test_a_valid_adapter_is_loaded_with_its_scale_folded_into_b(copy: AdapterRef, fits: AdapterTarget) -> None:
    weights = load_adapter(copy, fits)
    raw = load_file(copy.folder / WEIGHTS)
    module = "model.layers.0.self_attn.q_proj"
    a, b = weights.pairs[module]
    assert torch.equal(a, raw[f"base_model.model.{module}.lora_A.weight"])
    assert torch.equal(b, raw[f"base_model.model.{module}.lora_B.weight"] * 2.0)  # alpha 8 / rank 4
    assert (weights.sha256, weights.rank, len(weights.pairs)) == (copy.sha256, 4, 14)


CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type=LOHA"),
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias=all"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"invented_next_year": True}, "invented_next_year"),
    *(
        ({"init_lora_weights": init}, f"init_lora_weights={init} changes the base model")
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "next_years")
    ),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
    ({"monteclora_config": {"num_samples": 4}}, "monteclora_config"),
    ({"velora_config": {"scale": 1.0}}, "velora_config"),
    ({"megatron_config": {"x": 1}}, "megatron_config"),
    ({"r": 0}, "rank 0"),
    ({"r": 10_000}, "rank 10000"),
    ({"r": True}, "rank True"),
    ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ({"rank_pattern": [1]}, "rank_pattern"),
    ({"r": 8}, "shape"),
    ({"target_modules": ["q_proj"]}, "target_modules does not name"),
    ({"target_modules": []}, "target_modules does not name"),
    ({"target_modules": None}, "target_modules does not name"),
    ({"target_modules": 7}, "target_modules=7 is neither a string nor"),
    ({"target_modules": "(q_proj"}, "'(q_proj' is not a regular expression"),
    ({"target_modules": "(.*.*)*="}, "target_modules does not name"),
    ({"target_modules": "(?=q)q_proj"}, "cannot be matched in linear time"),
    ({"layers_to_transform": [0], "layers_pattern": "(.*)*"}, "is more than the name of a module"),
    ({"exclude_modules": [7]}, "exclude_modules"),
    ({"rank_pattern": {"*": 4}}, "'*' is not a regular expression"),
    ({"rank_pattern": {"q_proj": 0}}, "rank 0"),
    ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha '8'"),
    ({"lora_alpha": 1e40}, "too large"),
    ({"layers_pattern": "layers"}, "needs layers_to_transform"),
    ({"layers_to_transform": "0"}, "neither a number nor"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "cannot go with"),
    ({"exclude_modules": ["q_proj"]}, "target_modules does not name"),
    ({"layers_to_transform": [0]}, "target_modules does not name"),
]


def test_configurations_that_would_be_computed_otherwise_are_refused(
    fresh: Callable[[], AdapterRef], fits: AdapterTarget
) -> None:
    """The reason is in the detail for operators and in the message for people, in both languages."""
    for changes, reason in CONFIGURATIONS:
        ref = fresh()
        edit_config(ref, **changes)
        with pytest.raises(AdapterUnusable) as caught:
            load_adapter(ref, fits)
        said = caught.value.fields["reason"]
        assert isinstance(said, Lazy)
        assert reason in caught.value.detail, changes
        assert "copy@1" in caught.value.detail
        assert reason in said.render("en"), changes
        assert any("\u4e00" <= character <= "\u9fff" for character in said.render("zh")), changes


WEIGHT_FAULTS: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda t: t.pop(first(t, "B")), "lora_B of .* is missing"),
    (lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.up_proj" in name], "weights of .* are missing"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "not the A or B"),
    (lambda t: t.update({f"{first(t)[:-14]}lora_magnitude_vector": torch.ones(32)}), "not the A or B"),
    (lambda t: t.update({f"{first(t, 'B')[:-7]}.bias": torch.ones(32)}), "not the A or B"),
    (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 259)}),
        "not the A or B",
    ),
    (
        lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": t[first(t)] + 0}),
        "no linear",
    ),
    (lambda t: t.update({first(t): t[first(t)][:, :-1].clone()}), "shape"),
    (lambda t: t[first(t)].view(-1)[3:4].fill_(float("nan")), "not finite"),
    (lambda t: t.update({first(t): t[first(t)].to(torch.int8)}), "int8"),
    (lambda t: t.clear(), "missing"),
]


def test_weights_that_do_not_fit_are_refused(fresh: Callable[[], AdapterRef], fits: AdapterTarget) -> None:
    for change, reason in WEIGHT_FAULTS:
        ref = fresh()
        edit_tensors(ref, change)
        with pytest.raises(AdapterUnusable, match=reason):
            load_adapter(ref, fits)


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


FOLDER_FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (cut, "copy@1"),
    (pickle_instead, "pickled"),
    (lambda folder: (folder / WEIGHTS).unlink(), "missing"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a table"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "copy@1"),
    (lambda folder: (folder / "adapter_config.json").write_text('{"a":' * 100_000), "nested too deeply"),
    (lambda folder: (folder / "adapter_config.json").write_text(" " * 2**21), "larger"),
    (shutil.rmtree, "does not exist"),
    (lambda folder: (folder / "manifest.json").write_text('{"base_fingerprint": "another"}'), "made for the base"),
]


def test_damaged_folders_are_refused(fresh: Callable[[], AdapterRef], fits: AdapterTarget) -> None:
    for damage, reason in FOLDER_FAULTS:
        ref = fresh()
        damage(ref.folder)
        with pytest.raises(AdapterUnusable, match=reason) as caught:
            load_adapter(ref, fits)
        said = caught.value.fields["reason"]
        assert isinstance(said, Lazy)
        assert str(ref.folder) not in said.render("en")


def test_a_manifest_for_this_base_is_taken(copy: AdapterRef, fits: AdapterTarget) -> None:
    (copy.folder / "manifest.json").write_text(json.dumps({"base_fingerprint": fits.fingerprint}))
    load_adapter(copy, fits)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": r".*layers\.1\..*(up|down)_proj"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"layers_to_transform": []},
        {"layers_to_transform": [0], "target_modules": ["up_proj", "model.layers.1.mlp.down_proj"]},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": "mica"},
        {"exclude_modules": ["up_proj"]},
    ],
)
def test_every_way_that_peft_names_layers_is_read_as_peft_does(
    base: BaseModel, fits: AdapterTarget, tmp_path: Path, options: dict[str, Any]
) -> None:
    ref = save_adapter(base, tmp_path / "named", seed=1, **options)
    assert load_adapter(ref, fits).pairs


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6}},
        {"rank_pattern": {r"layers\.[01]\.mlp\..*": 3, "up_proj": 5}, "alpha_pattern": {".*_proj": 2, "q_proj": 9}},
        {"rank_pattern": {"^model.layers.0.mlp.up_proj": 2}, "alpha_pattern": {"o_proj$": 5}, "use_rslora": True},
        {"rank_pattern": {"q_proj|k_proj": 2}, "alpha_pattern": {"self_attn.(k|v)_proj": 1.5}},
    ],
)
def test_ranks_and_scales_by_pattern_are_those_that_peft_resolves(
    base: BaseModel, fits: AdapterTarget, tmp_path: Path, patterns: dict[str, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ref = save_adapter(base, tmp_path / "patterns", seed=1, **patterns)
    peft: Any = quietly(
        lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), ref.folder)
    )
    pairs = load_adapter(ref, fits).pairs
    ranks = set()
    for module, (a, b) in pairs.items():
        layer = peft.base_model.model.get_submodule(module)
        assert len(a) == layer.r["default"]
        assert torch.allclose(b, layer.lora_B["default"].weight * layer.scaling["default"], rtol=1e-6)
        ranks.add(len(a))
    assert len(ranks) > 1


KEYS = [
    "q_proj", "proj", "layers.1", "layers.1.self_attn.q_proj", "layers.1.self_attn.q", "layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj", "^model.layers.1.self_attn.q_proj", "^layers.1.self_attn.q_proj", "q_proj$",
    r"layers\.1\.self_attn\.q_proj", "layers.1.self.attn.q_proj", "self_attn.q.proj", "...proj", ".", r"\.q_proj",
    "a-b.q_proj", "self_attn.(q|k)_proj", ".*q_proj", "q_proj|mlp", r"layers\.[01]\..*",
]  # fmt: skip
MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in (1, 11) for name in "qk"] + ["q_proj", "a-b.q_proj", "q"]


@given(st.lists(st.sampled_from(KEYS), unique=True))
def test_keys_of_patterns_mean_what_they_mean_to_peft(keys: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    pattern = {key: key for key in keys}
    found = _by_pattern(MODULES, pattern, "")
    assert found == {module: pattern.get(get_pattern_key(keys, module), "") for module in MODULES}


def test_a_pattern_key_per_module_compiles_no_expression(
    base: BaseModel, fits: AdapterTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT writes them for EVA, and for what it converts."""
    ref = save_adapter(base, tmp_path / "eva", seed=1, r=4)
    own = {name: 4 for name in fits.shapes if name != fits.head}
    edit_config(ref, r=8, rank_pattern=own, alpha_pattern=own)
    monkeypatch.setattr("core.engine.lora.adapter_files.compile_pattern", None)
    assert {len(a) for a, _ in load_adapter(ref, fits).pairs.values()} == {4}


def test_too_many_expressions_are_refused(copy: AdapterRef, fits: AdapterTarget) -> None:
    edit_config(copy, rank_pattern={f"(a|b){i}": 4 for i in range(65)})
    with pytest.raises(AdapterUnusable, match="65 keys, 65 of them regular expressions"):
        load_adapter(copy, fits)
    edit_config(copy, rank_pattern={f"a{i}": 4 for i in range(4097)})
    with pytest.raises(AdapterUnusable, match="4097 keys"):
        load_adapter(copy, fits)


def test_a_converted_initialization_that_changes_the_base_is_accepted(
    base: BaseModel, fits: AdapterTarget, tmp_path: Path
) -> None:
    """PiSSA: what training made of the changed base, peft writes as a LoRA of twice the rank on the unchanged one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model: Any = quietly(lambda: get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), config))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "begin")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        wanted = model(input_ids=torch.tensor([[5, 6, 7]])).logits[:, -1]
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(AdapterUnusable, match="path_initial_model_for_weight_conversion"):
        load_adapter(AdapterRef("a" * 64, tmp_path / "bare"), fits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(tmp_path / "turned", path_initial_model_for_weight_conversion=str(tmp_path / "begin"))
    weights = load_adapter(AdapterRef("b" * 64, tmp_path / "turned"), fits)
    assert weights.rank == 4
    runner = Runner(base, max_rows=1, context=64)
    with torch.inference_mode():
        ours = runner.run(runner.cache.add_row(), [[5, 6, 7]], [runner.lora.acquire(weights)])
    assert torch.allclose(ours, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_the_output_head_may_be_adapted_without_a_copy_of_its_weights(
    base: BaseModel, fits: AdapterTarget, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        ref = save_adapter(base, tmp_path / "head", seed=1, target_modules=["lm_head", "q_proj"])
    with pytest.raises(AdapterUnusable, match="save_embedding_layers=False"):
        load_adapter(ref, fits)
    edit_tensors(ref, lambda t: [t.pop(name) for name in list(t) if "lora_" not in name])
    assert "lm_head" in load_adapter(ref, fits).pairs
    edit_config(ref, ensure_weight_tying=True)
    with pytest.raises(AdapterUnusable, match="ensure_weight_tying"):
        load_adapter(ref, fits)


def test_the_store_loads_once_keeps_few_and_forgets_failures(copy: AdapterRef, fits: AdapterTarget) -> None:
    store = AdapterStore(fits, limit=2)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(store.get(copy).result())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    bad = AdapterRef("c" * 64, copy.folder / "not there yet", "bad@1")
    with pytest.raises(AdapterUnusable):
        store.get(bad).result()
    shutil.copytree(copy.folder, bad.folder)
    assert store.get(bad).result().sha256 == bad.sha256
    for name in "def":
        store.get(AdapterRef(name * 64, copy.folder)).result()
        assert len(store) <= 2
    assert store.get(copy).result() is not found[0]  # dropped, while who holds it keeps it


def test_few_files_are_read_at_once_and_each_of_them_once(
    copy: AdapterRef, fits: AdapterTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more are wanted than the store holds."""
    stalled, begun = threading.Event(), threading.Semaphore(0)
    reads: list[str] = []

    def slow(ref: AdapterRef, base: AdapterTarget) -> AdapterWeights:
        reads.append(ref.sha256)
        begun.release()
        assert stalled.wait(60)
        return load_adapter(ref, base)

    monkeypatch.setattr("core.engine.lora.adapter_files.load_adapter", slow)
    store = AdapterStore(fits, limit=1)
    names = "abcdef"
    futures = [store.get(AdapterRef(name * 64, copy.folder)) for name in names * 2]
    assert all(begun.acquire(timeout=60) for _ in range(MAX_READS))
    assert not begun.acquire(timeout=0.3)
    stalled.set()
    assert [future.result().sha256[0] for future in futures] == [*names * 2]
    assert len(reads) == len(names)


def test_without_memory_to_double_slots_one_more_or_an_idle_one_is_used(
    base: BaseModel, adapters: list[AdapterRef], fits: AdapterTarget
) -> None:
    stacks = AdapterSlots(base.module, max_slots=4, device=base.device, dtype=base.dtype)
    a, b, c, _ = (load_adapter(ref, fits) for ref in adapters)
    resize, most = StackedLora.resize, 1

    def bounded(stack: StackedLora, slots: int, rank: int) -> None:
        if slots > most and stack is list(stacks.stacks.values())[-1]:  # after the others were laid out anew
            raise torch.OutOfMemoryError("CUDA out of memory")
        resize(stack, slots, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedLora, "resize", bounded)
        assert stacks.acquire(a) == 0
        with pytest.raises(torch.OutOfMemoryError):
            stacks.acquire(b)
        stacks.release(a.sha256)
        assert stacks.acquire(b) == 0
        most = 3
        assert [stacks.acquire(one) for one in (a, c)] == [1, 2]
        assert stacks.slot_count == 3
    assert all(len(stack.a) == 3 for stack in stacks.stacks.values())


@pytest.mark.parametrize("max_slots", [1, 3])
def test_an_idle_adapter_of_high_rank_causes_no_padding(
    base: BaseModel, adapters: list[AdapterRef], fits: AdapterTarget, tmp_path: Path, max_slots: int
) -> None:
    stacks, fresh = (
        AdapterSlots(base.module, max_slots=max_slots, device=base.device, dtype=base.dtype) for _ in range(2)
    )
    small = load_adapter(adapters[0], fits)
    big = load_adapter(save_adapter(base, tmp_path / "big", seed=5, r=64), fits)
    if max_slots > 1:
        stacks.acquire(small)
    stacks.acquire(big)
    if max_slots > 1:
        stacks.acquire(small)
        assert stacks.rank == big.rank  # it runs
    stacks.release(big.sha256)
    version = stacks.version
    slot = stacks.acquire(small)
    assert (stacks.rank, big.sha256 in stacks.slots) == (small.rank, False)
    assert stacks.version > version
    own = fresh.acquire(small)
    for name, stack in fresh.stacks.items():
        for mine, wanted in zip((stacks.stacks[name].a, *stacks.stacks[name].b), (stack.a, *stack.b), strict=True):
            assert torch.equal(mine[slot], wanted[own])
            assert not mine[[other for other in range(len(mine)) if other != slot]].any()


def test_a_rank_lowered_half_way_by_out_of_memory_can_be_raised(
    base: BaseModel, adapters: list[AdapterRef], fits: AdapterTarget, tmp_path: Path
) -> None:
    stacks, fresh = (AdapterSlots(base.module, max_slots=2, device=base.device, dtype=base.dtype) for _ in range(2))
    small = load_adapter(adapters[0], fits)
    big = load_adapter(save_adapter(base, tmp_path / "big", seed=5, r=64), fits)
    resize = StackedLora.resize

    def bounded(stack: StackedLora, slots: int, rank: int) -> None:
        if rank == small.rank and stack is list(stacks.stacks.values())[-1]:  # after the others were laid out anew
            raise torch.OutOfMemoryError("CUDA out of memory")
        resize(stack, slots, rank)

    for one in (small, big):
        stacks.acquire(one)
    stacks.release(big.sha256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StackedLora, "resize", bounded)
        stacks.acquire(small)
    slot, own = stacks.acquire(big), fresh.acquire(big)
    for name, stack in fresh.stacks.items():
        for mine, wanted in zip((stacks.stacks[name].a, *stacks.stacks[name].b), (stack.a, *stack.b), strict=True):
            assert torch.equal(mine[slot], wanted[own])


def test_a_slot_is_reused_only_without_users(base: BaseModel, adapters: list[AdapterRef], fits: AdapterTarget) -> None:
    stacks = AdapterSlots(base.module, max_slots=2, device=base.device, dtype=base.dtype)
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
