"""The fused forward pass gives the model's own logits; other models run their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.config.sections import ModelSettings
from core.engine.cpu.compiled import compiled
from core.engine.diagnostics.parity import check_parity
from core.engine.lora.adapter_files import AdapterWeights
from core.engine.lora.layers import StackedLora
from core.engine.lora.segments import SegmentPlanner
from core.engine.lora.slots import linear_shapes
from core.engine.runtime.fused import fuse
from core.engine.runtime.loading import load_for_serving
from core.engine.runtime.runner import Runner
from core.errors import ModelLoadFailed
from core.model.base import BaseModel
from tests.support.tiny import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
FAMILY = {
    "Llama": {},
    "Llama with biases, yarn and tied weights": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN,
    },
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
}  # fmt: skip
OTHERS = {"Gemma": {}, "Phi3": {"partial_rotary_factor": 1.0}, "SmolLM3": {}, "Olmo2": {}}


def made(kind: str, folder: Path, **changes: Any) -> BaseModel:
    """A model of random weights (norms and biases too), saved and loaded as any other."""
    import transformers

    name = kind.split()[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_for_serving(ModelSettings(name=str(folder), device="cpu"), folder)


def answers(runner: Runner, slots: list[int | None]) -> torch.Tensor:
    """Logits (B, V) of rows of different lengths after chunks that meet others' steps, and one step together."""
    for i in range(len(slots)):
        row = runner.cache.add_row()
        ids = [(3 + 7 * i + 5 * j) % 250 + 3 for j in range(70 + 9 * i)]
        for part in (ids[:33], ids[33:]):
            runner.run(0, [*([9 + j] for j in range(row)), part], slots[: row + 1])
    return runner.run(0, [[9 + i] for i in range(len(slots))], slots)


def adapter(model: BaseModel, name: str, rank: int, only: str = "") -> AdapterWeights:
    torch.manual_seed(rank)
    pairs = {
        module: (torch.randn(rank, size) * 0.2, torch.randn(out, rank) * 0.2)
        for module, (out, size) in linear_shapes(model.module).items()
        if only in module
    }
    return AdapterWeights(name, rank, pairs)


@pytest.mark.parametrize("kind", FAMILY)
@torch.inference_mode()
def test_the_fused_forward_gives_the_models_own_logits(kind: str, tmp_path: Path) -> None:
    model = made(kind, tmp_path, **FAMILY[kind])
    ids = torch.tensor([[5, 9, 100, 7, 31, 8]])
    before = model.module(input_ids=ids).logits
    check_parity(model)
    assert fuse(model.module) is not None
    assert torch.allclose(model.module(input_ids=ids).logits, before, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("kind", FAMILY)
@torch.inference_mode()
def test_fused_and_plain_agree_with_adapters(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters on all modules, and some on some, by each way. Layers amplify rounding."""
    model = made(kind, tmp_path, **FAMILY[kind])
    found = {}
    for way in ("fused", "plain", "fused, masked", "plain, masked"):
        with monkeypatch.context() as patch:
            if way.startswith("plain"):
                patch.setattr("core.engine.runtime.runner.fuse", lambda module: None)
            for mix in ("mixed", "in turn", "far apart", "single", "bare"):
                runner = Runner(model, max_rows=9, context=256)
                if "," in way:
                    runner.lora.planner.operators = runner.layers = None
                held = [adapter(model, "a", 8), adapter(model, "b", 3, only="v_proj"), adapter(model, "c", 1)]
                held += [adapter(model, f"unused {i}", 1) for i in range(5)] + [adapter(model, "d", 5)]
                a, b, c, *_, d = (runner.lora.acquire(one) for one in held)
                mixes: dict[str, list[int | None]] = {
                    "mixed": [a, None, b, c, a],
                    "in turn": [c, a, None, b, c, a, b],
                    "far apart": [d, a, d],
                    "single": [a] * 4,
                    "bare": [None] * 5,
                }
                found[way, mix] = answers(runner, mixes[mix])
                for module in model.module.modules():
                    module._forward_hooks.clear()
    for (way, mix), logits in found.items():
        plain = found["plain, masked", mix]
        assert float((logits - plain).abs().max()) <= 2e-5 * float(plain.abs().max()), (way, mix)
    assert float((found["fused", "mixed"] - found["fused", "bare"])[[0, 2, 3, 4]].abs().max(1).values.min()) > 0.01
    assert torch.allclose(found["fused", "mixed"][1], found["fused", "bare"][1], atol=1e-4)


MIXES: list[tuple[int | None, ...]] = [
    (2, None, 0, 2, 2, 1),
    (1,) * 5,
    (0, 0, 1, 1),
    (2,) * 20 + (0,) * 3,
    (None, 2),
]


@pytest.mark.parametrize("way", ["tiles", "mask"])
def test_tiles_and_masks_equal_the_product_in_float64(way: str) -> None:
    operators = compiled()
    if way == "tiles" and operators is None:
        pytest.skip("no compiler here")
    for mix in MIXES:
        torch.manual_seed(0)
        planner = SegmentPlanner(torch.device("cpu"), operators if way == "tiles" else None)
        outs, ranks = (96, 32, 32), (8, 3, 1)
        stack = StackedLora(64, outs, planner, device=planner.device, dtype=torch.float32, joined=way == "tiles")
        stack.resize(3, 8)
        x, y = torch.randn(len(mix), 64), torch.randn(len(mix), sum(outs))
        truth, begin = y.double(), 0
        for part, out in enumerate(outs):
            for slot, rank in enumerate(ranks):
                a, b = torch.randn(rank, 64), torch.randn(out, rank)
                stack.fill(slot, part, a, b)
                for token in (i for i, one in enumerate(mix) if one == slot):
                    truth[token, begin : begin + out] += b.double() @ (a.double() @ x[token].double())
            begin += out
        with planner.segments([(slot, 1) for slot in mix]):
            stack.add(x, y)
        assert float((y - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


@pytest.mark.parametrize("kind", OTHERS)
@torch.inference_mode()
def test_other_models_run_their_own_forward(kind: str, tmp_path: Path) -> None:
    model = made(kind, tmp_path, **OTHERS[kind])
    assert fuse(model.module) is None
    check_parity(model)


def test_a_model_with_an_unknown_module_runs_its_own_forward(base: BaseModel) -> None:
    import copy

    fused = fuse(base.module)
    module: Any = copy.deepcopy(base.module)
    assert fuse(module) not in (None, fused)  # a copy is fused anew
    module.model.layers[0].self_attn.extra = nn.Dropout()
    assert fuse(module) is None


def test_a_fused_forward_that_differs_is_refused(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.engine.runtime.fused._signed", lambda sin: sin)
    with pytest.raises(ModelLoadFailed, match="exactly"):
        check_parity(base)
