"""Adapter folders in PEFT's format to checked LoRA weights in host memory.

Only adapter_config.json and adapter_model.safetensors are read, without peft. Whatever the engine would not compute
exactly as PEFT does is refused with its reason, never approximated.
"""

import json
import logging
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.engine.lora.patterns import compile_pattern
from core.errors import AdapterUnusable
from core.i18n.messages import Lazy, Refusal
from core.types import AdapterRef

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
MAX_RANK = 256
MAX_READS = 4  # concurrent ones; each takes memory and CPU time
MAX_CONFIG_BYTES = 2**20
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
PLAIN_NAME = re.compile(r"[\w.]+")
PLAIN_KEY = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")  # a pattern key without backtracking
MAX_KEYS, MAX_EXPRESSIONS = 4096, 64  # keys of patterns, and how many of them may be expressions
PLAIN_INIT = ("true", "false", "gaussian", "eva", "orthogonal", "mica")  # others change the base model's weights
# Keys that are read below or do not change the result. Any other key must be empty.
# fmt: off
KNOWN_KEYS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """(A, B) per module, A (r, in), B (out, r) with the scale folded in. `rank` is the largest r."""

    sha256: str
    rank: int
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """What an adapter must fit: the model's fingerprint, and (out, in) of each module that adapters may change.

    `head` names the module that computes the logits.
    """

    fingerprint: str
    shapes: Mapping[str, tuple[int, int]]
    dtype: torch.dtype = torch.float32
    head: str = "lm_head"


class AdapterStore:
    """Loaded adapters by sha256, least recently used dropped first. Called from any thread; one load per adapter.

    A running request holds its own reference to the weights, so dropping one here never affects it.
    """

    def __init__(self, base: AdapterTarget, *, limit: int) -> None:
        self.base, self.limit = base, limit
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(MAX_READS)
        self._loaded: OrderedDict[str, Future[AdapterWeights]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._loaded)

    def get(self, ref: AdapterRef) -> Future[AdapterWeights]:
        """The adapter's weights; if they are not here, another thread reads them.

        The future may raise AdapterUnusable; failures are not cached. A load in progress is never dropped.
        """
        with self._lock:
            future = self._loaded.get(ref.sha256)
            mine = future is None
            if future is None:
                future = self._loaded[ref.sha256] = Future()
            self._loaded.move_to_end(ref.sha256)
            read = [key for key, one in self._loaded.items() if one.done()]
            for key in read[: max(0, len(self._loaded) - self.limit)]:
                del self._loaded[key]
        if mine:  # on a thread that ends, see LocalEngine.__aenter__
            try:
                threading.Thread(target=self._load, args=(ref, future), name="adapter").start()
            except RuntimeError as error:  # the system is out of threads
                self._failed(ref, future, error)
        return future

    def _load(self, ref: AdapterRef, future: Future[AdapterWeights]) -> None:
        try:
            with self._turns:
                weights = load_adapter(ref, self.base)
        except BaseException as error:  # raised to all that wait for this load
            self._failed(ref, future, error)
        else:
            log.info("adapter.loaded", extra={"adapter": ref.label or ref.sha256[:12]})
            future.set_result(weights)

    def _failed(self, ref: AdapterRef, future: Future[AdapterWeights], error: BaseException) -> None:
        with self._lock:
            if self._loaded.get(ref.sha256) is future:
                del self._loaded[ref.sha256]
        future.set_exception(error)


def load_adapter(ref: AdapterRef, base: AdapterTarget) -> AdapterWeights:
    """Read and check an adapter folder. Raises AdapterUnusable: detail for operators, `reason` for people."""
    try:
        _check_manifest(ref.folder, base)
        config = _read_config(ref.folder)
        ranks = _by_pattern(base.shapes, config.get("rank_pattern"), config["r"])
        alphas = _by_pattern(base.shapes, config.get("alpha_pattern"), config["lora_alpha"])
        found = _read_tensors(ref.folder, config, base, ranks)
        root = bool(config.get("use_rslora"))
        pairs = {
            module: _fold(module, sides, ranks[module], alphas[module], root, base.dtype)
            for module, sides in found.items()
        }
    except Refusal as error:
        raise _unusable(ref, str(error), error.reason) from error
    except RecursionError:
        raise _unusable(ref, f"{CONFIG} is nested too deeply") from None
    except (ValueError, OSError, SafetensorError) as error:
        raise _unusable(ref, str(error)) from error
    return AdapterWeights(ref.sha256, max(len(a) for a, _ in pairs.values()), pairs)


def _unusable(ref: AdapterRef, why: str, reason: Lazy | None = None) -> AdapterUnusable:
    name = ref.label or ref.sha256[:12]
    reason = reason or Lazy("unfit.unreadable", error=why.replace(f"{ref.folder}/", ""))
    return AdapterUnusable(detail=f"adapter {name} in {ref.folder}: {why}", reason=reason)


def _check_manifest(folder: Path, base: AdapterTarget) -> None:
    if not folder.is_dir():
        raise ValueError("the folder does not exist")
    if not (folder / MANIFEST).is_file():
        return
    manifest = _read_json(folder / MANIFEST)
    wanted = manifest.get("base_fingerprint")
    if wanted and wanted != base.fingerprint:
        made_for, loaded = str(wanted)[:12], base.fingerprint[:12]
        raise ValueError(f"it was made for the base model {made_for}, but the one loaded is {loaded}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes")
    values = json.loads(path.read_text("utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is not a table of keys and values")
    return values


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={config.get('peft_type')} is not LORA; peft can convert it")
    if config.get("bias", "none") != "none":
        raise Refusal("unfit.bias", bias=config["bias"])
    if str(config.get("init_lora_weights", True)).lower() not in PLAIN_INIT:
        raise Refusal("unfit.init", init=config["init_lora_weights"])
    for key, value in config.items():
        if key not in KNOWN_KEYS and value:
            raise Refusal("unfit.option", name=key, value=repr(value))
    _check_numbers(config)
    _check_names(config)
    return config


def _check_names(config: Mapping[str, Any]) -> None:
    """Check that everything that names modules has PEFT's form and that its regular expressions can be matched."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        listed = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not (value is None or isinstance(value, str) or listed):
            raise Refusal("unfit.no_texts", name=key, value=repr(value))
    targets, layers, patterns = (config.get(key) for key in ("target_modules", "layers_to_transform", "layers_pattern"))
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
        raise Refusal("unfit.no_numbers", value=repr(layers))
    if isinstance(targets, str) and (layers is not None or patterns):
        raise Refusal("unfit.layers_of_expression", value=repr(targets))
    if patterns and layers is None:
        raise Refusal("unfit.no_layers", value=repr(patterns))
    for one in [patterns] if isinstance(patterns, str) else patterns or []:
        if not PLAIN_NAME.fullmatch(one):
            raise Refusal("unfit.no_name", value=repr(one))
    keys = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    expressions = [one for one in keys if not PLAIN_KEY.fullmatch(one)]
    if len(keys) > MAX_KEYS or len(expressions) > MAX_EXPRESSIONS:
        raise Refusal(
            "unfit.many_keys",
            n=len(keys),
            expressions=len(expressions),
            most=MAX_KEYS,
            most_expressions=MAX_EXPRESSIONS,
        )
    for one in expressions:
        compile_pattern(one)
    for one in (targets, config.get("exclude_modules")):
        if isinstance(one, str):
            compile_pattern(one)


def _check_numbers(config: Mapping[str, Any]) -> None:
    patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise Refusal("unfit.no_tables")
    for rank in (config.get("r"), *patterns[0].values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
            raise Refusal("unfit.rank", rank=repr(rank), most=MAX_RANK)
    for alpha in (config.get("lora_alpha"), *patterns[1].values()):
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise Refusal("unfit.alpha", alpha=repr(alpha))


def _read_tensors(
    folder: Path, config: Mapping[str, Any], base: AdapterTarget, ranks: Mapping[str, int]
) -> dict[str, dict[str, Tensor]]:
    """{module: {"A": (r, in), "B": (out, r)}}, checked against the configuration and the base model."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = any((folder / name).exists() for name in ("adapter_model.bin", "adapter_model.pt"))
        reason = "; pickled weights can run code and are not read: save it as safetensors" if pickled else ""
        raise ValueError(f"{WEIGHTS} is missing{reason}")
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            match = TENSOR_NAME.fullmatch(key)
            if match is None:
                hint = "" if ".lora_" in key else Lazy("unfit.without_base")
                raise Refusal("unfit.tensor", name=key, hint=hint)
            module, side = match["module"], match["side"]
            _check_module(module, config, base)
            shape = tuple(file.get_slice(key).get_shape())
            if shape != (wanted := _shape(side, base.shapes[module], ranks[module])):  # checked before the data is read
                raise Refusal("unfit.shape", name=key, shape=shape, wanted=wanted)
            tensor = file.get_tensor(key)
            _check_tensor(key, tensor)
            found.setdefault(module, {})[side] = tensor
    _check_complete(found, config, base)
    return found


def _check_module(module: str, config: Mapping[str, Any], base: AdapterTarget) -> None:
    if module not in base.shapes:
        raise Refusal("unfit.no_module", module=module)
    if not _is_target(module, config):
        raise Refusal("unfit.not_named", module=module)


def _shape(side: str, linear: tuple[int, int], rank: int) -> tuple[int, int]:
    rows, columns = linear
    return (rank, columns) if side == "A" else (rows, rank)


def _check_tensor(key: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise Refusal("unfit.dtype", name=key, dtype=tensor.dtype)
    if not bool(tensor.isfinite().all()):
        raise Refusal("unfit.not_finite", name=key)


def _check_complete(found: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], base: AdapterTarget) -> None:
    for module, sides in found.items():
        if missing := {"A", "B"} - sides.keys():
            raise Refusal("unfit.half", side=missing.pop(), module=module)
    for module in base.shapes:
        if module not in found and _is_target(module, config) and not (_is_all(config) and module == base.head):
            raise Refusal("unfit.missing", module=module)
    if not found:
        raise ValueError("it changes no layer of this base model")
    if base.head in found and config.get("ensure_weight_tying"):
        raise Refusal("unfit.tied", head=base.head)


def _is_all(config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT would put a LoRA on that module (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _named(module, excluded):
        return False
    if _is_all(config):
        return True
    if not targets or not _named(module, targets):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or module in targets:  # a module named in full is targeted in any layer
        return True
    patterns = config.get("layers_pattern") or []
    named = [rf"(?:^|.*?\.){one}" for one in ([patterns] if isinstance(patterns, str) else patterns)]
    for pattern in named or [r".*?\.[^.]*"]:
        if match := re.match(rf"{pattern}\.(?P<index>\d+)\.", module):
            return int(match["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(module: str, names: Any) -> bool:
    if isinstance(names, str):
        return compile_pattern(names).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(modules: Iterable[str], pattern: Mapping[str, Any] | None, default: Any) -> dict[str, Any]:
    """For each module the value of the first key that its name ends with (peft/utils/other.py, get_pattern_key)."""
    endings = [(_ending(key), value) for key, value in (pattern or {}).items()]
    return {module: next((value for ends, value in endings if ends(module)), default) for module in modules}


def _ending(key: str) -> Callable[[str], object]:
    whole = rf"(.*\.)?({key})$"
    return re.compile(whole).match if PLAIN_KEY.fullmatch(key) else compile_pattern(whole).fullmatch


def _fold(
    module: str, sides: Mapping[str, Tensor], rank: int, alpha: float, root: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, scale * B); the scale is alpha / r, or alpha / sqrt(r) with rsLoRA."""
    scale = alpha / (math.sqrt(rank) if root else rank)
    a, b = sides["A"].to(dtype), (sides["B"].float() * scale).to(dtype)
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise Refusal("unfit.too_large", module=module, scale=scale, dtype=dtype)
    return a, b.t().contiguous().t()  # in the layout of a slot, so that the model thread only copies
