"""OpenAI's completions format: request bodies, server-sent events, checked response chunks.

An impossible response raises ValueError, whose text continues a sentence that begins with the server's name ("counts 3
tokens ..."). It never quotes an answer.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from core.types import Sampling

MAX_LINE = 2**20
MAX_MESSAGE = 300  # characters of a server's message in a detail
OPTIONAL_FIELDS = (  # strict servers may refuse these; dropped in this order if the error names none
    "continuous_usage_stats",
    "cache_salt",
    "include_stop_str_in_output",
    "stop_token_ids",
    "min_p",
    "repetition_penalty",
    "top_k",
)
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One completion. The server reuses prefixes only between requests of equal `salt`."""

    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream. Counts are of the whole answer so far; None where the event has none.

    `finish` is the server's finish_reason at the end of the text; `stopped_by` the stop string, if it names one.
    """

    text: str = ""
    finish: str = ""
    stopped_by: str = ""
    completion_tokens: int | None = None
    cached_tokens: int = 0


def body(completion: CompletionRequest, refused: Collection[str]) -> dict[str, Any]:
    """The request body without the OPTIONAL_FIELDS that the server refuses. Raises ValueError if it needs one of them.

    Every parameter is sent explicitly: defaults are the server's own (vLLM's come with the model).
    """
    sampling = completion.sampling
    extras = {name: getattr(sampling, name) for name in NEUTRAL}
    for name, neutral in NEUTRAL.items():
        if name in refused and extras[name] != neutral:
            raise ValueError(f"does not know {name}, which is set to {extras[name]} here")
    extras |= {"cache_salt": completion.salt, "stop_token_ids": list(completion.stop_ids)}
    options = {"include_usage": True, "continuous_usage_stats": True}
    if sampling.stop:  # the stop string is cut off here
        extras |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
    return {
        "model": completion.model,
        "prompt": list(completion.prompt),
        "max_tokens": completion.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": sampling.seed,
        "stream": True,
        "stream_options": {name: value for name, value in options.items() if name not in refused},
        **{name: value for name, value in extras.items() if value not in ("", []) and name not in refused},
    }


async def events(parts: AsyncIterator[bytes]) -> AsyncGenerator[str]:
    """Data of server-sent events, one line each. Raises ValueError.

    Lines end with a line feed only: text may hold U+2028 and others at which str.splitlines cuts.
    """
    buffer = b""
    async for part in parts:
        *lines, buffer = (buffer + part).split(b"\n")
        if len(buffer) > MAX_LINE:
            raise ValueError(f"sent an event longer than {MAX_LINE} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                try:
                    yield line[5:].strip().decode()
                except UnicodeDecodeError:
                    raise ValueError("sent an event that is not UTF-8") from None


def read_object(text: str) -> dict[str, Any]:
    """A JSON object; {} if the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def error_message(answer: Mapping[str, Any]) -> str:
    """The message of an error in OpenAI's form, in FastAPI's, or empty."""
    error = answer.get("error", answer)
    found = (error.get("message") or error.get("detail") or "") if isinstance(error, dict) else error
    return " ".join(str(found).split())[:MAX_MESSAGE]


def read_chunk(event: Mapping[str, Any], completion: CompletionRequest, tokens: int) -> Chunk:
    """One event of the answer, after `tokens` counted ones. Raises ValueError."""
    if not event:
        raise ValueError("sent an event that is no JSON object")
    if event.get("model") != completion.model:
        raise ValueError(f"answered from {str(event.get('model'))[:80]!r} when asked for {completion.model!r}")
    choices, usage = event.get("choices") or [], event.get("usage") or {}
    if not (isinstance(choices, list) and len(choices) <= 1 and isinstance(usage, dict)):
        raise ValueError("sent an event with neither one choice nor usage")
    choice = choices[0] if choices else {}
    text = (choice.get("text") or "") if isinstance(choice, dict) else None
    if not isinstance(text, str):
        raise ValueError("sent a choice without text")
    stopped_by, details = choice.get("stop_reason"), usage.get("prompt_tokens_details")
    return Chunk(
        text=text,
        finish=str(choice.get("finish_reason") or ""),
        stopped_by=stopped_by if isinstance(stopped_by, str) else "",
        completion_tokens=_checked_count(usage, completion, tokens) if usage else None,
        cached_tokens=token_count(details.get("cached_tokens")) or 0 if isinstance(details, dict) else 0,
    )


def token_count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _checked_count(usage: Mapping[str, Any], completion: CompletionRequest, tokens: int) -> int:
    """Completion tokens so far, checked to be possible, since people are charged for them."""
    prompt, answered = token_count(usage.get("prompt_tokens")), token_count(usage.get("completion_tokens"))
    if prompt != len(completion.prompt):
        raise ValueError(f"counts {prompt} prompt tokens where {len(completion.prompt)} were sent")
    if answered is None or not tokens <= answered <= completion.max_tokens:
        raise ValueError(f"counts {answered} tokens after {tokens} where {completion.max_tokens} were allowed")
    return answered
