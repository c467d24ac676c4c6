"""The folder of a base model: where it is, and what is in it. Weights are read by their headers only, without torch."""

import os
import sys
from pathlib import Path
from typing import Any

from core.config.sections import ModelSettings
from core.errors import ModelLoadFailed
from core.model.demo import Progress, demo_folder
from core.model.weights import fingerprint, weight_files

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
WANTED = "name a folder with config.json, safetensors weights and a tokenizer, or such a model on the Hugging Face hub"


def model_folder(settings: ModelSettings, cache: Path, progress: Progress | None = None) -> Path:
    """The local folder of the model: the converted demo, the named folder, or a download from the Hugging Face hub.

    Raises ModelLoadFailed.
    """
    name = settings.name
    if name == "demo":
        _stay_offline()
        return demo_folder(cache, progress)
    local = Path(name).expanduser()
    if local.is_dir():
        _stay_offline()
        return local.resolve()
    if local.suffix.lower() == ".gguf":
        raise ModelLoadFailed(
            detail=f"model.name={name} is a GGUF file, which llama.cpp reads and this engine not: {WANTED}"
        )
    if local.is_file():
        raise ModelLoadFailed(detail=f"model.name={name} is a file: {WANTED}")
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelLoadFailed(detail=f"model.name={name}: there is no such folder")
    return _from_hub(settings, progress)


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Check configuration, weight files and tokenizer of a model folder without loading weights.

    Raises ModelLoadFailed with the reason. `weights=False` is for a folder that only renders prompts.
    """
    config = read_config(folder)
    if weights:
        check_weights(folder)
        folder_fingerprint(folder)
    read_tokenizer(folder, vocab_size=config.get_text_config().vocab_size)


def read_config(folder: Path) -> Any:
    """The transformers configuration of a causal language model. Raises ModelLoadFailed."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        found = _other_formats(folder)
        hint = f" but {found}: {WANTED}" if found else ""
        raise ModelLoadFailed(detail=f"{folder} holds no config.json, so it is not a model folder{hint}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        detail = f"{folder}/config.json is not known to transformers (code of the model's own is not run): {error}"
        raise ModelLoadFailed(detail=detail) from error
    for name in config.architectures or []:
        if not name.endswith(CAUSAL):
            raise ModelLoadFailed(detail=f"{folder} holds a {name}, not a causal language model")
    return config


def read_tokenizer(folder: Path, *, vocab_size: int) -> Any:
    """The tokenizer, which must have a chat template and fit the model's embeddings. Raises ModelLoadFailed."""
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


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights. Raises ModelLoadFailed for a damaged index of them."""
    try:
        return bool(weight_files(folder))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def check_weights(folder: Path) -> None:
    """Raise ModelLoadFailed if the folder holds no safetensors weights."""
    if not has_weights(folder):
        reason = _other_formats(folder) or "none at all"
        raise ModelLoadFailed(detail=f"{folder} holds no safetensors weights, {reason}: save it as safetensors")


def folder_fingerprint(folder: Path) -> str:
    """core.model.weights.fingerprint. Raises ModelLoadFailed."""
    try:
        return fingerprint(folder)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ModelLoadFailed:
    return ModelLoadFailed(detail=f"the weights in {folder} are damaged: {error}")


def _other_formats(folder: Path) -> str:
    """Weights in a format that is not read, or nothing."""
    if gguf := sorted(path.name for path in folder.glob("*.gguf")):
        return f"only a GGUF file ({gguf[0]}), which llama.cpp reads"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    return f"only pickled ones ({pickles[0]}), which can run code when loaded" if pickles else ""


def _stay_offline() -> None:
    """Keep huggingface_hub from asking the network. It reads the variable when it is first imported."""
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
