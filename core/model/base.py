"""The base model and its tokenizer: device, dtype, quantisation, each with its reason in the log.

What the engine could not serve exactly is refused here, with the reason. Knows nothing of requests, adapters or chats.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from core.config.sections import ModelSettings
from core.errors import ModelLoadFailed, OutOfMemory
from core.model import demo
from core.model.demo import Progress, demo_folder
from core.model.plain_linear import make_plain
from core.model.weights import fingerprint, weight_files

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
QUANTIZATIONS = ("none", "int8", "8bit", "4bit")
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

# Types whose attention is code of their own that transformers cannot lead elsewhere, known to be full and to add the
# mask that it is given to its scores. Others of that sort have windows or biases by position, which a mask would break.
BY_MASK = frozenset({"codegen", "falcon", "gptj", "xglm"})


def attends_by_mask(config: Any) -> bool:
    """Whether such a model attends by its own code, and sees what the mask that it is given allows."""
    return config.model_type in BY_MASK


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded model. `context` is what it can take in exactly; `fingerprint` is of its files (core.model.weights)."""

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
    """Load what the settings name. `cache` takes the converted demo model; `threads` 0 means as torch has it.

    int8 weights are quantised later, by core.engine.runtime.loading. Raises ModelLoadFailed with a detail that names
    the thing, the value and the way out; OutOfMemory.
    """
    device, dtype = _device(settings.device), _dtype(settings)
    _check_quantization(settings.quantization, device, dtype)
    if dtype is None:
        dtype = _auto_dtype(device)
    folder = _folder(settings, cache, progress)
    config = _config(folder)
    _check_weights(folder)
    context = exact_context(config)
    tokenizer = _tokenizer(folder, vocab_size=config.get_text_config().vocab_size)
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)
    module = _module(folder, config, device, dtype, settings.quantization)
    model = BaseModel(
        name=demo.TITLE if settings.name == "demo" else settings.name,
        module=module,
        tokenizer=tokenizer,
        folder=folder,
        device=device,
        dtype=dtype,
        context=context,
        eos_ids=_eos_ids(module.generation_config, tokenizer),
        fingerprint=_fingerprint(folder),
        template_sha256=hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest(),
        description=_describe(device, dtype, settings.quantization),
    )
    log.info("model.loaded", extra={"model": model.name, "fingerprint": model.fingerprint[:12], "context": context})
    return model


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that runs elsewhere, as its folder here tells it. `device` is this machine's, for a trainer.

    `fingerprint` is "" where the folder holds no weights; then it is good for rendering, not for training.
    """

    name: str
    tokenizer: Any
    folder: Path
    device: torch.device
    context: int
    eos_ids: frozenset[int]
    fingerprint: str


def read_model(settings: ModelSettings, cache: Path, *, progress: Progress | None = None) -> ModelFiles:
    """Read what the settings name, but no weights. Raises ModelLoadFailed as load_model does."""
    from transformers import GenerationConfig

    device = _device(settings.device)
    folder = _folder(settings, cache, progress)
    config = _config(folder)
    text = config.get_text_config()
    tokenizer = _tokenizer(folder, vocab_size=text.vocab_size)
    given = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if given else GenerationConfig.from_model_config(text)
    return ModelFiles(
        name=demo.TITLE if settings.name == "demo" else settings.name,
        tokenizer=tokenizer,
        folder=folder,
        device=device,
        context=getattr(text, "max_position_embeddings", None) or 2048,
        eos_ids=_eos_ids(generation, tokenizer),
        fingerprint=_fingerprint(folder) if _weight_files(folder) else "",
    )


def exact_context(config: Any) -> int:
    """How many tokens the engine serves exactly over one slot per row.

    Rotary scaling that depends on the length of the whole batch is constant below its original length: there the
    context is bounded. Raises ModelLoadFailed for what differs at any length.
    """
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise _unfit(config, "it is an encoder-decoder model, not a causal language model")
    if getattr(text, "is_decoder", True) is False and hasattr(text, "type_vocab_size"):  # BERT and its kin
        raise _unfit(config, "it is an encoder (is_decoder=false): each token sees those that come later")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if others := kinds - {"full_attention", "sliding_attention"}:
        named = ", ".join(sorted(others))
        raise _unfit(config, f"it has layers of the kind {named}; keys and values are kept for full and sliding ones")
    bounds = {"max_position_embeddings": getattr(text, "max_position_embeddings", None) or 2048}
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


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        log.info("model.device", extra={"device": str(found), "reason": "auto: CUDA if there is a GPU"})
        return found
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ModelLoadFailed(detail=f"device={wanted} is not one of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadFailed(detail=f"device={wanted} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadFailed(detail=f"device={wanted}, but torch sees no CUDA GPU: set device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadFailed(detail=f"device={wanted}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def _dtype(settings: ModelSettings) -> torch.dtype | None:
    """What the settings name; None for auto."""
    if settings.dtype != "auto" and settings.dtype not in DTYPES:
        raise ModelLoadFailed(detail=f"dtype={settings.dtype} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES.get(settings.dtype)


def _auto_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        chosen, reason = torch.float32, "the CPU computes fastest and exactly in float32"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        chosen, reason = torch.bfloat16, "the GPU computes in bfloat16"
    else:
        chosen, reason = torch.float16, "the GPU is too old for bfloat16"
    log.info("model.dtype", extra={"dtype": SHORT[chosen], "reason": reason})
    return chosen


def _check_quantization(wanted: str, device: torch.device, dtype: torch.dtype | None) -> None:
    if wanted not in QUANTIZATIONS:
        raise ModelLoadFailed(detail=f"quantization={wanted} is not one of {', '.join(QUANTIZATIONS)}")
    if wanted == "none":
        return
    if wanted == "int8":
        if device.type != "cpu":
            raise ModelLoadFailed(detail="quantization=int8 is for the CPU; on a GPU set quantization=8bit")
        if dtype not in (None, torch.float32):
            raise ModelLoadFailed(detail=f"quantization=int8 computes in float32, not in {SHORT[dtype]}")
        return
    if device.type != "cuda":
        raise ModelLoadFailed(detail=f"quantization={wanted} needs a CUDA GPU; on the CPU set quantization=int8")
    if find_spec("bitsandbytes") is None:
        raise ModelLoadFailed(detail=f"quantization={wanted} needs the package bitsandbytes: pip install bitsandbytes")


def _folder(settings: ModelSettings, cache: Path, progress: Progress | None) -> Path:
    """The local folder of the model: converted, as named, or fetched from the hub."""
    if settings.name == "demo":
        _stay_offline()
        return demo_folder(cache, progress)
    local = Path(settings.name).expanduser()
    if local.is_dir():
        _stay_offline()
        return local.resolve()
    if local.is_absolute() or settings.name.startswith((".", "~")) or settings.name.count("/") > 1:
        raise ModelLoadFailed(detail=f"model.name={settings.name}: there is no such folder")
    return _from_hub(settings, progress)


def _stay_offline() -> None:
    """Nothing on the hub is needed, so nothing asks it. Read when huggingface_hub is first imported."""
    if "huggingface_hub" not in sys.modules:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _from_hub(settings: ModelSettings, progress: Progress | None) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    what = f"model.name={settings.name}" + (f", revision={settings.revision}" if settings.revision else "")
    if progress:
        progress(0.0, "fetching")
    try:
        found = snapshot_download(
            settings.name,
            revision=settings.revision or None,
            allow_patterns=HUB_FILES,
            ignore_patterns=["consolidated*", "original/*", "onnx/*"],
        )
    except hub.GatedRepoError as error:
        raise ModelLoadFailed(detail=f"{what} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except hub.RevisionNotFoundError as error:
        raise ModelLoadFailed(detail=f"{what}: the model has no such revision") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise ModelLoadFailed(detail=f"{what} is neither a folder here nor a model on the Hugging Face hub") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        detail = f"{what} is not in the local cache, and the Hugging Face hub cannot be reached: name a local folder"
        raise ModelLoadFailed(detail=detail) from error
    return Path(found)


def _config(folder: Path) -> Any:
    """The model's configuration, checked to be a causal language model's."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelLoadFailed(detail=f"{folder} holds no config.json, so it is not a model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        detail = f"{folder}/config.json is not known to transformers (code of the model's own is not run): {error}"
        raise ModelLoadFailed(detail=detail) from error
    for name in config.architectures or []:
        if not name.endswith(CAUSAL):
            raise ModelLoadFailed(detail=f"{folder} holds a {name}, not a causal language model")
    return config


def _weight_files(folder: Path) -> list[Path]:
    try:
        return weight_files(folder)
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(detail=f"the weights in {folder} are damaged: {error}") from error


def _check_weights(folder: Path) -> None:
    if not _weight_files(folder):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        reason = f"only pickled ones ({pickles[0]}), which can run code when loaded" if pickles else "none at all"
        raise ModelLoadFailed(detail=f"{folder} holds no safetensors weights, {reason}: save it as safetensors")


def _tokenizer(folder: Path, *, vocab_size: int) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelLoadFailed(detail=f"{folder} holds no tokenizer: put the model's tokenizer.json there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelLoadFailed(detail=f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        detail = f"the tokenizer in {folder} has no chat template: put one there as chat_template.jinja"
        raise ModelLoadFailed(detail=detail)
    if len(tokenizer) > vocab_size:
        detail = f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model only {vocab_size}"
        raise ModelLoadFailed(detail=detail)
    return tokenizer


def _module(folder: Path, config: Any, device: torch.device, dtype: torch.dtype, quantization: str) -> torch.nn.Module:
    from safetensors import SafetensorError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the terminal draws its own
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unfit(config, "transformers has no causal language model of this type")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(kind, "_is_stateful", False):
        raise _unfit(config, "it keeps a state that is not plain keys and values")
    if not (attends_by_mask(config) or kind._can_set_attn_implementation()):
        raise _unfit(config, "its attention is code of its own, which cannot be led to the engine's slots")
    options: dict[str, Any] = {"device_map": device} if device.type == "cuda" else {}
    if quantization in ("8bit", "4bit"):
        options["quantization_config"] = _bitsandbytes(quantization, dtype)
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


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        # A threshold would take columns apart that are large in any row, so one tenant's outlier would change another's
        # numbers (and the host would be asked in every layer). Without it each row is scaled by itself.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _eos_ids(generation: Any, tokenizer: Any) -> frozenset[int]:
    """All tokens that end a turn: those of generation_config.json, and the tokenizer's own."""
    named = getattr(generation, "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return frozenset(int(i) for i in ids if i is not None)


def _fingerprint(folder: Path) -> str:
    try:
        return fingerprint(folder)
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(detail=f"the weights in {folder} are damaged: {error}") from error


def _describe(device: torch.device, dtype: torch.dtype, quantization: str) -> str:
    held = SHORT[dtype] if quantization == "none" else f"{quantization} weights, {SHORT[dtype]}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {held}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads != 1 else ''}, {held}"
