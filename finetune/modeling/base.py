"""Loads the base model for training: full precision, frozen, with its fingerprint verified."""

import hashlib
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from core.errors import JobError
from core.jobs.protocol import Spec
from core.model.plain_linear import make_plain
from core.model.weights import fingerprint
from finetune.settings import refused

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TrainingBase:
    """`name` is shown to users: never a path."""

    name: str
    fingerprint: str
    template_sha256: str
    folder: Path
    tokenizer: Any
    context: int  # tokens; sys.maxsize if the configuration has no limit


def check_device(spec: Spec) -> None:
    """Raises JobError for a missing GPU."""
    device, there = torch.device(spec.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise refused("no_device", device=spec.device, n=there)


def find_base(spec: Spec, job_folder: Path, fresh: Path | None = None) -> TrainingBase:
    """Verify the base model's fingerprint; load its tokenizer and context. Raises JobError.

    `fresh`: folder of a new model, used instead of spec.model.
    """
    folder = fresh or job_folder / spec.model  # spec.model may be absolute
    try:
        found = fingerprint(folder)
    except (OSError, ValueError) as error:
        raise JobError("training.why_base", f"the base model in {folder} cannot be read: {error}") from error
    if not fresh and spec.fingerprint and found != spec.fingerprint:
        detail = f"the base model in {folder} is {found[:12]}, but the job is for {spec.fingerprint[:12]}"
        raise JobError("training.why_base_changed", detail)
    tokenizer = load_tokenizer(folder)
    template = hashlib.sha256(str(tokenizer.get_chat_template()).encode()).hexdigest()
    name = "a fresh configuration" if fresh else spec.model_name or folder.name
    return TrainingBase(name, found, template, folder, tokenizer, _context(folder))


def _context(folder: Path) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise JobError("training.why_base", f"the configuration in {folder} cannot be read: {error}") from error
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def load_tokenizer(folder: Path) -> Any:
    """Raises JobError, also for one without a chat template."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise JobError("training.why_base", f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise JobError(detail=f"the tokenizer in {folder} has no chat template")
    return tokenizer


def choose_dtype(spec: Spec) -> torch.dtype:
    """Precision of the base weights; "auto" is bfloat16 on a GPU, float32 on a CPU. Raises JobError."""
    if spec.dtype == "auto":
        return torch.float32 if torch.device(spec.device).type == "cpu" else torch.bfloat16
    if spec.dtype not in DTYPES:
        raise JobError(detail=f"dtype={spec.dtype} is not auto, {' or '.join(DTYPES)} (float16 overflows in training)")
    return DTYPES[spec.dtype]


def load_module(base: TrainingBase, spec: Spec, device: torch.device | None = None) -> Any:
    """The frozen model on `device`, by default the spec's. Raises JobError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    dtype = torch.float32 if spec.method != "lora" else choose_dtype(spec)  # master weights are float32
    bits: dict[str, Any] = {"quantization_config": _four_bits(spec)} if spec.hyper.quantization == "4bit" else {}
    try:
        module = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **bits,
        )
        if spec.method == "lora":  # a fully trained model keeps the names and shapes of its file
            make_plain(module)
        return module.requires_grad_(False).to(device or torch.device(spec.device))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise JobError("training.why_base", f"the base model in {base.folder} cannot be loaded: {error}") from error


def load_again(base: TrainingBase, spec: Spec, device: torch.device) -> Any:
    """Load the base model again. Raises JobError if its files changed."""
    if fingerprint(base.folder) != base.fingerprint:
        detail = f"the base model in {base.folder} was changed while it was trained from"
        raise JobError("training.why_base_changed", detail)
    return load_module(base, spec, device)


def _four_bits(spec: Spec) -> Any:
    """QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4, double quantisation, bfloat16. Raises JobError."""
    if spec.method != "lora":
        raise refused("four_bits_lora")
    if torch.device(spec.device).type != "cuda":
        raise refused("four_bits_cuda", device=spec.device)
    if find_spec("bitsandbytes") is None:
        raise refused("four_bits_package")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
