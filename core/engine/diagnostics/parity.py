"""Parity check at load: the engine's logits against the model's own forward pass.

Logits computed through slots, chunks and mixed passes are compared with the model's own attention without a cache:
bare, with sliding windows short enough to matter, and with an adapter. A model whose attention works otherwise is
refused, whatever its configuration says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.engine.cpu.int8 import Int8Linear
from core.engine.lora.adapter_files import AdapterWeights
from core.engine.lora.slots import linear_modules
from core.engine.runtime import attention
from core.engine.runtime.runner import Runner
from core.errors import ModelLoadFailed
from core.model.base import BaseModel

TOKENS = 24
WINDOW = 7
LORA_STD = 0.05


@torch.inference_mode()
def check_parity(model: BaseModel) -> None:
    """Compare the engine with the model's own forward pass: two rows, chunked prefill, a joint step. ~0.3 s; also warms
    up.

    Raises ModelLoadFailed if they differ by more than rounding.

    """
    vocab = model.module.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]  # a transformers model
    texts = [[(7 + 31 * i) % vocab for i in range(TOKENS)], [(5 + 17 * i) % vocab for i in range(TOKENS // 2)]]
    runner = Runner(model, max_rows=len(texts), context=TOKENS)
    try:
        with _short_windows(model.module):
            _compare(model, "", _by_slots(model, texts, None), _alone(model, texts, None))
        if runner.fused is None:  # tests cover adapters of the family; other models may use their layers differently
            adapter = _some_adapter(model)
            _compare(model, "adapters on ", _by_slots(model, texts, adapter), _alone(model, texts, adapter))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError) as error:
        raise ModelLoadFailed(detail=f"the engine cannot drive {model.name}, name another model: {error}") from error


def _compare(model: BaseModel, what: str, found: Tensor, wanted: Tensor) -> None:
    tolerance = 1e-3 if model.dtype is torch.float32 else 0.1
    if any(isinstance(child, Int8Linear) for child in model.module.modules()):
        tolerance = 0.3  # rounding in the last bit changes int8 activations by whole steps; a wrong mask differs more
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= tolerance:  # also for NaN
        detail = (
            f"the engine would not serve {what}{model.name} exactly: its logits differ from the model's own by "
            f"{difference:.1%}; its layers work in a way that the engine does not know, so name another model"
        )
        raise ModelLoadFailed(detail=detail)


def _by_slots(model: BaseModel, texts: Sequence[Sequence[int]], adapter: AdapterWeights | None) -> Tensor:
    """(2, V) after the last tokens, by the engine; the first row uses the adapter."""
    runner = Runner(model, max_rows=len(texts), context=TOKENS)
    long, short = texts
    half, few = len(long) // 2, len(short) // 2
    try:
        slot = None if adapter is None else runner.lora.acquire(adapter)
        runner.run(runner.cache.add_row(), [long[:half]], [slot])
        runner.run(runner.cache.add_row(), [short[:few]], [None])
        runner.run(0, [long[half : half + 1], short[few:-1]], [slot, None])  # a decode step beside a chunk
        runner.run(0, [long[half + 1 : -1]], [slot])
        return runner.run(0, [long[-1:], short[-1:]], [slot, None]).float()
    finally:
        runner.lora.close()


def _alone(model: BaseModel, texts: Sequence[Sequence[int]], adapter: AdapterWeights | None) -> Tensor:
    """The same by the model itself, one text at a time."""
    module: Any = model.module
    found = []
    with attention.eager_attention(module):
        for ids, pairs in zip(texts, (adapter.pairs if adapter else {}, {}), strict=True):
            hooks = [module.get_submodule(name).register_forward_hook(_adding(*pair)) for name, pair in pairs.items()]
            try:
                found.append(module(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[:, -1])
            finally:
                for hook in hooks:
                    hook.remove()
    return torch.cat(found).float()


def _adding(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + inputs[0] @ a.t().to(output.device) @ b.t().to(output.device)

    return hook


def _some_adapter(model: BaseModel) -> AdapterWeights:
    """Random weights of rank 1 on every module that adapters may change."""
    dice = torch.Generator().manual_seed(0)
    pairs = {}
    for name, linear in linear_modules(model.module):
        a = torch.randn(1, linear.in_features, generator=dice) * linear.in_features**-0.5
        b = torch.randn(linear.out_features, 1, generator=dice) * LORA_STD
        pairs[name] = (a.to(model.dtype), b.to(model.dtype))
    return AdapterWeights("parity", 1, pairs)


@contextmanager
def _short_windows(module: nn.Module) -> Iterator[None]:
    """Make all sliding windows shorter than the texts: real ones are too long to be reached at each load."""
    places: list[Any] = [*module.modules()]
    places += [one for child in places for one in _configs(child)]
    held = {id(place): (place, vars(place).get("sliding_window")) for place in places}
    found = [(place, window) for place, window in held.values() if isinstance(window, int) and window > WINDOW]
    try:
        for place, _ in found:
            place.sliding_window = WINDOW
        yield
    finally:
        for place, window in found:
            place.sliding_window = window


def _configs(module: nn.Module) -> list[Any]:
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return []
    return [config, config.get_text_config()]
