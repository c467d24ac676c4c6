"""Where and how a base model is held: device, dtype, quantization. Choices of `auto` are logged with their reason."""

import logging
from importlib.util import find_spec
from typing import Any

import torch

from core.config.sections import ModelSettings
from core.errors import ModelLoadFailed

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
QUANTIZATIONS = ("none", "int8", "8bit", "4bit")


def choose_device(wanted: str) -> torch.device:
    """The device that the settings name. Raises ModelLoadFailed if this machine does not have it."""
    if wanted == "auto":
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        log.info("model.device", extra={"device": str(found), "reason": "auto: CUDA if there is a GPU"})
        return found
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadFailed(detail=f"device={wanted} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadFailed(detail=f"device={wanted}, but torch sees no CUDA GPU: set device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadFailed(detail=f"device={wanted}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def choose_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    """The dtype that weights are held in, checked with the quantization. Raises ModelLoadFailed."""
    if settings.dtype != "auto" and settings.dtype not in DTYPES:
        raise ModelLoadFailed(detail=f"dtype={settings.dtype} is not one of auto, {', '.join(DTYPES)}")
    named = DTYPES.get(settings.dtype)
    _check_quantization(settings.quantization, device, named)
    if named is not None:
        return named
    if device.type == "cpu":
        chosen, reason = torch.float32, "the CPU computes fastest and exactly in float32"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        chosen, reason = torch.bfloat16, "the GPU computes in bfloat16"
    else:
        chosen, reason = torch.float16, "the GPU is too old for bfloat16"
    log.info("model.dtype", extra={"dtype": SHORT[chosen], "reason": reason})
    return chosen


def _check_quantization(wanted: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """dtype None is auto."""
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


def bitsandbytes_config(quantization: str, dtype: torch.dtype) -> Any:
    """The transformers configuration of `8bit` and `4bit`."""
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        # A threshold splits off columns that are large in any row of the batch, so one tenant's outlier would change
        # another's numbers, and each layer would synchronize with the host. 0 scales each row by itself.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def describe(device: torch.device, dtype: torch.dtype, quantization: str) -> str:
    """For people: "CPU, 2 threads, fp32"."""
    held = SHORT[dtype] if quantization == "none" else f"{quantization} weights, {SHORT[dtype]}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {held}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads != 1 else ''}, {held}"
