"""Loads a base model for serving: attention over KV slots, int8 weights if configured."""

from pathlib import Path

from core.config.sections import ModelSettings
from core.engine.cpu.int8 import quantize
from core.engine.runtime import attention
from core.model.base import BaseModel, attends_by_mask, load_model
from core.model.demo import Progress


def load_for_serving(
    settings: ModelSettings, cache: Path, *, progress: Progress | None = None, threads: int = 0
) -> BaseModel:
    """The model as `LocalEngine` runs it. Raises as core.model.base.load_model does."""
    model = load_model(settings, cache, progress=progress, threads=threads)
    if not attends_by_mask(model.module.config):
        model.module.set_attn_implementation(attention.NAME)  # type: ignore[operator]  # transformers is not typed
    if settings.quantization == "int8":
        quantize(model.module)
    return model
