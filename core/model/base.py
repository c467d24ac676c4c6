"""Loads the base model and its tokenizer. A model that could not be served exactly is refused with the reason."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.config.sections import ModelSettings
from core.errors import ModelLoadFailed, OutOfMemory
from core.model import demo
from core.model.demo import Progress
from core.model.devices import SHORT, bitsandbytes_config, choose_device, choose_dtype, describe
from core.model.folder import check_weights, folder_fingerprint, has_weights, model_folder, read_config, read_tokenizer
from core.model.plain_linear import make_plain

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 2048  # where the configuration names none

# Model types with attention code of their own that transformers cannot redirect, but which is full attention and adds
# the given mask to its scores. Other such types have windows or position biases that a mask would break.
BY_MASK = frozenset({"codegen", "falcon", "gptj", "xglm"})


def attends_by_mask(config: Any) -> bool:
    """Whether a model of this type runs its own attention, with the engine's mask."""
    return config.model_type in BY_MASK


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded model. `context` is the number of tokens served exactly."""

    name: str
    module: torch.nn.Module
    tokenizer: Any
    folder: Path
    device: torch.device
    dtype: torch.dtype
    context: int
    eos_ids: frozenset[int]
    fingerprint: str
    template_sha256: str
    description: str  # for people: "CPU, 2 threads, fp32"


def load_model(
    settings: ModelSettings, cache: Path, *, progress: Progress | None = None, threads: int = 0
) -> BaseModel:
    """Load the model that the settings name. `cache` takes the converted demo model; `threads` 0 keeps torch's number.

    int8 weights are quantized later, by core.engine.runtime.loading. Raises ModelLoadFailed, whose detail names the
    setting or file, its value and the remedy, and OutOfMemory.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings, device)
    folder = model_folder(settings, cache, progress)
    config = read_config(folder)
    check_weights(folder)
    context = exact_context(config)
    tokenizer = read_tokenizer(folder, vocab_size=config.get_text_config().vocab_size)
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)
    module = _load_module(folder, config, device, dtype, settings.quantization)
    model = BaseModel(
        name=_title(settings),
        module=module,
        tokenizer=tokenizer,
        folder=folder,
        device=device,
        dtype=dtype,
        context=context,
        eos_ids=_eos_ids(module.generation_config, tokenizer),
        fingerprint=folder_fingerprint(folder),
        template_sha256=hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest(),
        description=describe(device, dtype, settings.quantization),
    )
    log.info("model.loaded", extra={"model": model.name, "fingerprint": model.fingerprint[:12], "context": context})
    return model


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The local files of a model that runs on a server. `device` is this machine's, for a trainer.

    `fingerprint` is "" where the folder holds no weights: it can render prompts, but not be trained on.
    """

    name: str
    tokenizer: Any
    folder: Path
    device: torch.device
    context: int
    eos_ids: frozenset[int]
    fingerprint: str


def read_model(settings: ModelSettings, cache: Path, *, progress: Progress | None = None) -> ModelFiles:
    """Read everything that the settings name but the weights. Raises ModelLoadFailed as load_model does."""
    from transformers import GenerationConfig

    device = choose_device(settings.device)
    folder = model_folder(settings, cache, progress)
    text = read_config(folder).get_text_config()
    tokenizer = read_tokenizer(folder, vocab_size=text.vocab_size)
    given = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if given else GenerationConfig.from_model_config(text)
    return ModelFiles(
        name=_title(settings),
        tokenizer=tokenizer,
        folder=folder,
        device=device,
        context=getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT,
        eos_ids=_eos_ids(generation, tokenizer),
        fingerprint=folder_fingerprint(folder) if has_weights(folder) else "",
    )


def exact_context(config: Any) -> int:
    """Number of tokens that the engine serves exactly with one KV slot per row.

    Rotary scaling that depends on the longest row of a batch is constant below its original length, so the context is
    bounded there. Raises ModelLoadFailed for models that differ at any length.
    """
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise _unfit(config, "it is an encoder-decoder model, not a causal language model")
    if getattr(text, "is_decoder", True) is False and hasattr(text, "type_vocab_size"):  # BERT and relatives
        raise _unfit(config, "it is an encoder (is_decoder=false): each token sees those that come later")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if others := kinds - {"full_attention", "sliding_attention"}:
        named = ", ".join(sorted(others))
        raise _unfit(config, f"it has layers of the kind {named}; keys and values are kept for full and sliding ones")
    bounds = {"max_position_embeddings": getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT}
    bounds |= _rope_bounds(text)
    limit, cause = min((bound, name) for name, bound in bounds.items())
    if cause != "max_position_embeddings":
        log.warning("model.context_bounded", extra={"tokens": limit, "cause": cause})
    return int(limit)


def _rope_bounds(text: Any) -> dict[str, int]:
    rope = getattr(text, "rope_parameters", None) or {}
    per_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    bounds = {}
    for parameters in per_layer:
        kind = parameters.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
            bounds[f"rope_type={kind}"] = int(original)
    return bounds


def _unfit(config: Any, reason: str) -> ModelLoadFailed:
    return ModelLoadFailed(detail=f"the engine cannot serve a model of the type {config.model_type}: {reason}")


def _load_module(
    folder: Path, config: Any, device: torch.device, dtype: torch.dtype, quantization: str
) -> torch.nn.Module:
    from safetensors import SafetensorError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the terminal shows its own
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unfit(config, "transformers has no causal language model of this type")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(kind, "_is_stateful", False):
        raise _unfit(config, "it keeps a state that is not plain keys and values")
    if not (attends_by_mask(config) or kind._can_set_attn_implementation()):
        raise _unfit(config, "its attention is code of its own, which cannot be led to the engine's slots")
    options: dict[str, Any] = {"device_map": device} if device.type == "cuda" else {}
    if quantization in ("8bit", "4bit"):
        options["quantization_config"] = bitsandbytes_config(quantization, dtype)
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemory(detail=f"{folder} does not fit on {device} as {SHORT[dtype]}: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AssertionError, SafetensorError) as error:
        raise ModelLoadFailed(detail=f"{folder} cannot be loaded as a causal language model: {error}") from error
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ModelLoadFailed(detail=f"the weights in {folder} do not fill the model: {len(wrong)} wrong, {wrong[0]}")
    module = module.requires_grad_(False).eval()
    make_plain(module)
    return module  # type: ignore[no-any-return]  # transformers is not typed


def _title(settings: ModelSettings) -> str:
    return demo.TITLE if settings.name == "demo" else settings.name


def _eos_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    """All tokens that end a turn: those of generation_config.json and the tokenizer's own."""
    named = getattr(generation, "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return frozenset(int(i) for i in ids if i is not None)
