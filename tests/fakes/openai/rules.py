"""What a request must look like, field by field. Stricter than vLLM, which lets unknown fields pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Refused(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and one >= 0 for one in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one for one in value)


def _stream_options(value: Any) -> bool:
    known = {"include_usage", "continuous_usage_stats"}
    return isinstance(value, dict) and value.keys() <= known and all(isinstance(one, bool) for one in value.values())


NEEDED = {"model", "prompt", "max_tokens", "stream"}
COMPLETION: Mapping[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, str) and bool(value),
    "prompt": lambda value: _ids(value) and bool(value),
    "max_tokens": _whole(1, 2**31),
    "temperature": _number(0, 2),
    "top_p": _number(1e-9, 1),
    "top_k": _whole(-1, 2**31),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(1e-9, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": _texts,
    "stop_token_ids": _ids,
    "include_stop_str_in_output": lambda value: isinstance(value, bool),
    "stream": lambda value: value is True,
    "stream_options": _stream_options,
    "cache_salt": lambda value: isinstance(value, str) and 0 < len(value) <= 1024,
}


def check_completion(body: Any, refuses: set[str], vocabulary: int) -> None:
    """Raises Refused. `refuses` are fields that this server is too old or too strict for."""
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    if missing := NEEDED - body.keys():
        raise Refused(400, f"Field required: {', '.join(sorted(missing))}")
    for name, value in body.items():
        if name not in COMPLETION or name in refuses:
            raise Refused(400, f"Unrecognized request argument supplied: {name}")
        if not COMPLETION[name](value):
            raise Refused(422, f"Input should be valid: {name}")
    for name in body.get("stream_options", {}):
        if name in refuses:
            raise Refused(400, f"Unrecognized request argument supplied: {name}")
    if max(body["prompt"]) >= vocabulary:
        raise Refused(400, f"Token id {max(body['prompt'])} is out of vocabulary")
