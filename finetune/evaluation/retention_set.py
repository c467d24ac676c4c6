"""What the base model can do, so that a fine-tune does not unlearn it: its own greedy answers to generic prompts.

Some are rehearsed: they are trained beside the data set's rows. Others are only measured: what the candidate thinks of
the base's answers, in nats per token, says whether it still can do what the base could (rehearsal against forgetting:
Scialom et al. 2022, arXiv 2205.12393). Knows no data set and no verdict.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import files
from core.errors import AppError, JobError
from core.jobs.protocol import Answered, Spec
from core.model.chat_format import TrainingRow, render
from core.types import Message, Role
from finetune.evaluation.row_losses import Listen
from finetune.modeling.base import TrainingBase
from finetune.prepare import Emit

log = logging.getLogger(__name__)
PROMPTS = Path(__file__).parent / "prompts.toml"
FILE, BEGUN = "own-answers.json", "own-answers.begun.json"
REHEARSED_TOKENS, MEASURED_TOKENS = 80, 120
FEWEST_REHEARSED = 16
AT_ONCE = 48  # prompts that are answered side by side
Answer = tuple[tuple[int, ...], int]  # (ids of prompt and answer, how many of them are the prompt)


@dataclass(frozen=True, slots=True)
class OwnAnswers:
    """`sha256` is of all of it: what is trained on belongs to a job's identity."""

    rehearsed: tuple[TrainingRow, ...]
    measured: tuple[TrainingRow, ...]
    skills: tuple[str, ...]  # of each that is measured
    sha256: str

    def to_rehearse(self, rows: int, share: float) -> list[TrainingRow]:
        """As many as go with so many rows of a data set; spread over all kinds of prompts."""
        if share <= 0 or not self.rehearsed:
            return []
        count = how_many(len(self.rehearsed), rows, share)
        return [self.rehearsed[at * len(self.rehearsed) // count] for at in range(count)]


NOTHING = OwnAnswers((), (), (), "")


@dataclass(frozen=True, slots=True)
class Asked:
    """The generic prompts, as ids; `skills` are those of `measured`."""

    rehearsed: tuple[tuple[int, ...], ...]
    measured: tuple[tuple[int, ...], ...]
    skills: tuple[str, ...]


def how_many(known: int, rows: int, share: float) -> int:
    """Of so many rows to rehearse, how many go with so many rows of a data set."""
    return min(known, max(FEWEST_REHEARSED, round(rows * share))) if share > 0 else 0


def asked(base: TrainingBase, instructions: str) -> Asked:
    """Those that leave the model room for an answer."""
    given = _prompts()
    rehearsed = [_prompt(prompt, instructions, base) for prompt in given["rehearsed"]]
    measured = [
        (skill, _prompt(prompt, instructions, base)) for skill, some in given["measured"].items() for prompt in some
    ]
    measured = [(skill, ids) for skill, ids in measured if len(ids) + MEASURED_TOKENS <= base.context]
    return Asked(
        tuple(ids for ids in rehearsed if len(ids) + REHEARSED_TOKENS <= base.context),
        tuple(ids for _, ids in measured),
        tuple(skill for skill, _ in measured),
    )


def is_kept(spec: Spec, base: TrainingBase) -> bool:
    """Whether an earlier job has left the base's answers under these instructions."""
    key = _key(base, spec.instructions)
    return bool(spec.cache) and _kept(Path(spec.cache) / f"{key[:32]}.json", key) is not None


def own_answers(
    folder: Path, cache: Path | None, base: TrainingBase, instructions: str, model: Any, listen: Listen, emit: Emit
) -> OwnAnswers:
    """The base's answers under these instructions: of this job, else of an earlier one, else made now.

    `model` must answer as the base does. Raises Interrupted; what is answered by then is not asked again.
    """
    key, prompts = _key(base, instructions), asked(base, instructions)
    places = [folder / FILE, *([cache / f"{key[:32]}.json"] if cache else [])]
    found = next((text for place in places if (text := _kept(place, key)) is not None), None)
    if found is None:
        found = json.dumps({"key": key, **_make(folder / BEGUN, key, prompts, base, model, listen, emit)})
    for place in places:
        if _kept(place, key) is None:
            place.parent.mkdir(parents=True, exist_ok=True)
            files.write(place, found.encode())
    given = json.loads(found)
    return OwnAnswers(
        tuple(_row(answer) for answer in given["rehearsed"]),
        tuple(_row(answer) for answer in given["measured"]),
        prompts.skills,
        hashlib.sha256(found.encode()).hexdigest(),
    )


def answer(
    model: Any, prompts: Sequence[Sequence[int]], *, most: int, ends: Sequence[int], listen: Listen
) -> list[tuple[int, ...]]:
    """The greedy answer to each prompt, as ids, with its end token if it came to an end within `most` tokens."""
    said: list[tuple[int, ...]] = [()] * len(prompts)
    for some in _batches(prompts):
        for at, ids in zip(some, _answer_batch(model, [prompts[at] for at in some], most, ends, listen), strict=True):
            said[at] = ids
    return said


def _batches(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Which prompts are answered side by side: those of like length."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    return [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer, as the model's own generation settings have them."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or tokenizer.eos_token_id
    return list(given) if isinstance(given, list | tuple) else [int(given)]


@torch.no_grad()
def _answer_batch(
    model: Any, prompts: Sequence[Sequence[int]], most: int, ends: Sequence[int], listen: Listen
) -> list[tuple[int, ...]]:
    """One batch, padded on the left; padding is masked by length, never recognised by its id. Who has ended leaves."""
    device, width = model.device, max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in prompts], device=device)  # (B, T)
    seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    last = torch.tensor([-1], device=device)  # as a number it would be a view, for whose product weights are copied
    cache: Any = None
    said: list[list[int]] = [[] for _ in prompts]
    running = list(said)  # in the batch's order
    for _ in range(most):
        listen()
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=last,
        )  # fmt: skip
        cache = out.past_key_values
        chosen = out.logits[:, -1].argmax(-1)  # (B,)
        for one, token in zip(running, chosen.tolist(), strict=True):
            if not one or one[-1] not in ends:
                one.append(token)
        going_on = [at for at, one in enumerate(running) if one[-1] not in ends]
        if not going_on:
            break
        ids = chosen[:, None]
        seen = torch.cat([seen, torch.ones_like(ids)], dim=1)
        if len(going_on) < len(running) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
            index = torch.tensor(going_on, device=device)
            cache.batch_select_indices(index)
            ids, seen, running = ids[index], seen[index], [running[at] for at in going_on]
    return [tuple(one) for one in said]


def _make(
    begun: Path, key: str, prompts: Asked, base: TrainingBase, model: Any, listen: Listen, emit: Emit
) -> dict[str, list[Answer | None]]:
    """Batch by batch, written down after each."""
    ends = end_tokens(model, base.tokenizer)
    log.info("ability.answering prompts=%d", len(prompts.measured) + len(prompts.rehearsed))
    model.eval()
    kinds = (("rehearsed", prompts.rehearsed, REHEARSED_TOKENS), ("measured", prompts.measured, MEASURED_TOKENS))
    kept = _kept(begun, key)
    made: dict[str, list[Answer | None]] = (
        json.loads(kept)["made"] if kept else {name: [None] * len(some) for name, some, _ in kinds}
    )
    count = sum(len(some) for some in made.values())
    for name, some, most in kinds:
        for batch in _batches(some):
            emit(Answered(sum(one is not None for some in made.values() for one in some), count))
            if all(made[name][at] for at in batch):
                continue
            said = _answer_batch(model, [some[at] for at in batch], most, ends, listen)
            for at, ours in zip(batch, said, strict=True):
                made[name][at] = ((*some[at], *ours), len(some[at]))
            files.write(begun, json.dumps({"key": key, "made": made}).encode())
    emit(Answered(count, count))
    begun.unlink(missing_ok=True)
    return made


def _prompts() -> dict[str, Any]:
    return tomllib.loads(PROMPTS.read_text("utf-8"))


def _prompt(prompt: str, instructions: str, base: TrainingBase) -> tuple[int, ...]:
    system = (Message(Role.SYSTEM, instructions),) if instructions else ()
    try:
        return render((*system, Message(Role.USER, prompt)), base.tokenizer, 10**9).ids
    except AppError as error:
        raise JobError(detail=f"the chat template cannot be used: {error.detail or error}") from error


def _row(answer: Sequence[Any]) -> TrainingRow:
    """All that the base said is taught. Where it was cut, no end is: it did not say one."""
    ids, start = answer
    return TrainingRow(tuple(ids), (False,) * start + (True,) * (len(ids) - start))


def _key(base: TrainingBase, instructions: str) -> str:
    parts = (base.fingerprint, base.template_sha256, instructions, PROMPTS.read_text("utf-8"))
    return hashlib.sha256("\x1f".join((*parts, f"{REHEARSED_TOKENS} {MEASURED_TOKENS}")).encode()).hexdigest()


def _kept(path: Path, key: str) -> str | None:
    """What was written there, if it is whole and of this key."""
    try:
        text = path.read_text("utf-8")
        return text if json.loads(text).get("key") == key else None
    except (OSError, ValueError, AttributeError):
        return None
