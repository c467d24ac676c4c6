"""Tiny random models of many families answer as transformers and PEFT do, beyond any window."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.config.sections import ModelSettings
from core.engine.diagnostics.parity import TOKENS, check_parity
from core.engine.runtime import kv_cache
from core.engine.runtime.fused import fuse
from core.engine.runtime.loading import load_for_serving
from core.engine.runtime.runner import Runner
from core.errors import ModelLoadFailed
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.core.engine.lora.test_exact import prompts, spy_answers
from tests.support.engine_dialogue import ask, hear, running
from tests.support.tiny import peft_answers, save_adapter, tiny_tokenizer

pytestmark = pytest.mark.slow

N = 12
WINDOW = 40  # prompts and answers are longer, the proof's texts are shorter
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,  # tied, a random model repeats the token it was given
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"] * 2
SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": MIXED}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 2.0,
    "original_max_position_embeddings": 160,
}
EVERY = {"sliding_window": WINDOW}
MERGED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
# fmt: off
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Llama": ({"rope_parameters": LLAMA3}, []),
    "Mistral": (EVERY, []),
    "Qwen2": ({"use_sliding_window": True, "max_window_layers": 2, **EVERY}, []),
    "Qwen3": ({"use_sliding_window": True, **SLIDING}, []),
    "Gemma": ({}, []),
    "Gemma2": ({"attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0, **SLIDING}, []),
    "Gemma3": (SLIDING, []),
    "Phi": ({"partial_rotary_factor": 0.5}, ["q_proj", "v_proj", "dense", "fc1", "fc2"]),
    "Phi3": (EVERY, MERGED),
    "Phi3 with longrope": ({"head_dim": 8, "rope_parameters": LONGROPE, **EVERY}, MERGED),
    "SmolLM3": ({"no_rope_layers": [1, 1, 0, 1], "use_sliding_window": True, **SLIDING}, []),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}, ["q_proj", "k_proj", "o_proj"]),
    "Qwen3Moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_sliding_window": True, **EVERY},
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "DeepseekV3": (
        {"num_key_value_heads": 6, "head_dim": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
         "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    ),
    "GPTNeoX": ({"rotary_pct": 0.5}, ["query_key_value", "dense", "dense_h_to_4h"]),
    "GPT2": ({}, ["c_attn", "c_proj", "c_fc"]),
    "GPTJ": ({"rotary_dim": 4}, ["q_proj", "v_proj", "fc_in", "fc_out"]),
    "CodeGen": (
        {"hidden_size": 64, "num_attention_heads": 4, "rotary_dim": 8, "n_ctx": 256}, ["qkv_proj", "out_proj", "fc_in"]
    ),
    "XGLM": ({"num_attention_heads": 4}, ["q_proj", "v_proj", "fc1", "fc2"]),
    "Falcon": ({"head_dim": None}, ["query_key_value", "dense", "dense_h_to_4h"]),
    "Falcon of many queries": (
        {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2}, ["query_key_value", "dense"]
    ),
}
# fmt: on


def made(kind: str, folder: Path, changes: dict[str, Any]) -> BaseModel:
    """A model of random weights (norms, biases and sinks too), saved and loaded as any other."""
    name = kind.split()[0]
    found = [f"{name}TextConfig", f"{name}Config"]
    config = next(getattr(transformers, one) for one in found if hasattr(transformers, one))
    torch.manual_seed(0)
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_for_serving(ModelSettings(name=str(folder), device="cpu"), folder)


@pytest.mark.parametrize("kind", FAMILIES)
async def test_rows_beyond_the_window_equal_generate_with_and_without_adapters(kind: str, tmp_path: Path) -> None:
    changes, targets = FAMILIES[kind]
    base = made(kind, tmp_path / "base", changes)
    options: dict[str, Any] = {"target_modules": targets} if targets else {}
    options |= {"fan_in_fan_out": True} if kind == "GPT2" else {}  # or PEFT warns
    first = save_adapter(base, tmp_path / "first", seed=1, std=0.1, r=4, **options)
    second = save_adapter(base, tmp_path / "second", seed=2, std=0.1, r=2, use_rslora=True, **options)
    refs: list[AdapterRef | None] = [None, first, second, first]
    texts = [f"{i} " + "along the river " * (i % 4) for i in range(4)]
    ids = prompts(base, texts)
    assert len(ids[0]) < WINDOW < len(ids[2])
    expected = peft_answers(base, refs, ids, N, attention="eager")
    async with running(base, max_rows=4, max_context=base.context) as engine:
        engine.thread.chunk = 30
        answers = spy_answers(engine)
        requests = [ask(text, adapter=ref, max_tokens=N) for text, ref in zip(texts, refs, strict=True)]
        await asyncio.gather(*(hear(engine.submit(request)) for request in requests))
        assert [answers[text] for text in texts] == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)


@pytest.mark.parametrize("kind", ["GPTNeo", "Bloom", "Mpt", "Falcon"])
def test_attention_that_a_mask_would_break_is_refused(kind: str, tmp_path: Path) -> None:
    """Local windows that a configuration names otherwise, and biases by position."""
    changes = {"GPTNeo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW}}
    with pytest.raises(ModelLoadFailed, match=r"code of its own|name another model"):
        check_parity(made(kind, tmp_path, {"head_dim": None, "alibi": True, **changes.get(kind, {})}))


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2", "SmolLM3"])
@torch.inference_mode()
def test_windows_matter_and_the_context_is_not_cut_to_them(kind: str, tmp_path: Path) -> None:
    """Logits after 150 tokens equal the model's own, and would not if its windows were wider."""
    changes, _ = FAMILIES[kind]
    base = made(kind, tmp_path / "base", changes)
    assert base.context == 256
    ids = [(11 * i + i * i) % 250 + 3 for i in range(150)]
    runner = Runner(base, max_rows=1, context=256)
    runner.cache.add_row()
    for part in (ids[:70], ids[70:149], ids[149:]):
        ours = runner.run(0, [part], [None])
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(base.folder, attn_implementation="eager").eval()
    wanted = plain(input_ids=torch.tensor([ids])).logits[:, -1]
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < 1e-4
    runner = Runner(base, max_rows=1, context=256)
    for layer in base.module.modules():
        if isinstance(getattr(layer, "sliding_window", None), int):
            layer.sliding_window = 200  # type: ignore[assignment]
    base.module.config.sliding_window = 200  # type: ignore[union-attr]
    fuse(base.module)
    runner.cache.add_row()
    wide = runner.run(0, [ids], [None])
    assert float((wide - wanted).abs().max() / wanted.abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["Mistral", "Gemma3"])
def test_a_missing_window_is_found_at_load_whatever_its_length(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, _ = FAMILIES[kind]
    base = made(kind, tmp_path / "base", changes)
    assert TOKENS < WINDOW
    bias = kv_cache.SlotSegment.bias
    monkeypatch.setattr(kv_cache.SlotSegment, "bias", lambda self, window, *rest: bias(self, None, *rest))
    monkeypatch.setattr("core.engine.runtime.fused._window", lambda config, attention: None)
    with pytest.raises(ModelLoadFailed, match="exactly"):
        check_parity(base)
    text: Any = base.module.config
    assert text.sliding_window == WINDOW  # as it was, whatever came out


def test_adapters_that_a_model_applies_differently_are_found_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = made("Gemma", tmp_path / "base", {})
    norm: Any = base.module.model.norm  # type: ignore[union-attr]
    norm.register_forward_pre_hook(lambda module, inputs: None)
    mlp: Any = base.module.model.layers[1].mlp  # type: ignore[union-attr]
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flip(0)).flip(0)  # rows in another order: the same numbers, but for adapters
    with pytest.raises(ModelLoadFailed, match="adapters on"):
        check_parity(base)
