"""Evaluates the candidate, the champion and the base model on the test rows.

The candidate is whatever delta the model carries, or an adapter folder. Losses by row and line number, never texts, are
kept in JOBDIR/scores.json, so that finetune.evaluation.gate can be recomputed without a model.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core import files
from core.errors import AppError, JobError
from core.jobs.protocol import SHOWN, Evaluated, Judged, Shown, Spec
from core.types import Role
from finetune.data.encode import Row, prompt_of
from finetune.evaluation import sanity
from finetune.evaluation.gate import Health, Scores, forgotten, judge
from finetune.evaluation.retention_set import OwnAnswers, answer, end_tokens
from finetune.evaluation.row_losses import RowLosses, supervised
from finetune.modeling.methods import Trained
from finetune.prepare import Prepared

log = logging.getLogger(__name__)
SCORES = "scores.json"
MOST_SHOWN, MOST_CHARACTERS = 20, 300
Carrying = Callable[[], AbstractContextManager[object]]  # a context in which the model is the candidate
EmitEvaluated = Callable[[Evaluated], None]
Warn = Callable[..., None]  # (message key, fields)
Write = Callable[[Path, bytes], None]  # writes a file durably, on rank 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`losses` has the keys of the manifest: test_base, test_candidate, ability."""

    judged: Judged
    losses: dict[str, float]


@dataclass(frozen=True, slots=True)
class Evaluator:
    folder: Path
    spec: Spec
    prepared: Prepared
    retention: OwnAnswers
    trained: Trained
    row_losses: RowLosses
    warn: Warn
    write: Write = files.write

    def evaluate(self, candidate: Carrying, emit: EmitEvaluated, *, step: int = 0) -> Evaluation:
        """Raises JobError for a loss that is not finite; Interrupted."""
        numbers = self.prepared.split.test
        tokens = supervised(self.prepared.tested(numbers))
        with candidate():
            mine = self._scores(numbers)
        with self.trained.untrained():
            base = self._scores(numbers)
        champion, label = self._champion(base)
        losses = {"test_candidate": sum(mine.own) / sum(tokens), "test_base": sum(base.own) / sum(tokens)}
        for who in ("candidate", "base"):
            _check_finite(who, losses[f"test_{who}"])
            loss = losses[f"test_{who}"]
            emit(Evaluated(step, "test", loss, len(numbers), "base" if who == "base" else "candidate"))
        health, kept = self._health(candidate) if self.spec.ability else (Health(), {})
        if health.ability is not None:
            losses["ability"] = health.ability
        lines = [self.prepared.encoded[number].line for number in numbers]
        scores = {"candidate": asdict(mine), "champion": asdict(champion), "base": asdict(base)}
        everything = {"lines": lines, "tokens": tokens, **scores, "health": asdict(health), "ability": kept}
        self.write(self.folder / SCORES, json.dumps(everything).encode())
        judged = judge(
            mine, champion, tokens, champion_label=label, seed=self.spec.hyper.seed, health=health, lines=lines
        )
        if not self.prepared.plain:  # plain text has no questions
            self.write(self.folder / SHOWN, self._shown(judged).dump().encode())
        return Evaluation(judged, losses)

    def _shown(self, judged: Judged) -> Shown:
        """Texts of the worst rows, and questions for comparing answers by hand."""
        rows = [self.prepared.encoded[number] for number in self.prepared.split.test]
        text_of = {row.line: _question_and_answer(row) for row in rows}
        unseen = sorted(rows, key=lambda row: row.key)[:MOST_SHOWN]  # by hash: an arbitrary sample
        return Shown(
            tuple((*one, *text_of[one[0]]) for one in judged.worst), tuple(text_of[row.line] for row in unseen)
        )

    def _champion(self, base: Scores) -> tuple[Scores, str]:
        """Scores and label of the champion; of the base model where there is none, or it cannot be loaded."""
        if self.spec.champion:
            try:
                with self.trained.version(self.folder / self.spec.champion, self.prepared.base.fingerprint):
                    return self._scores(self.prepared.split.test), self.spec.champion_label
            except AppError as error:
                log.warning("gate.champion_unreadable %s", error.detail or error)
                self.warn("champion", champion=self.spec.champion_label)
        return base, "base"

    def _scores(self, numbers: Sequence[int]) -> Scores:
        own, other = self.prepared.tested(numbers), self.prepared.swapped(numbers)
        return Scores(self.row_losses.of(own), self.row_losses.of(other))

    def _health(self, candidate: Carrying) -> tuple[Health, dict[str, Any]]:
        """Retention and soundness of the candidate against the base model, and the losses behind them."""
        measured = self.retention.measured
        rows = [self.prepared.encoded[number] for number in self.prepared.split.test]
        most = sanity.longest([sum(row.row.supervised) for row in rows[: sanity.ASKED]])
        room = self.prepared.base.context - most  # longer questions would leave too little context for the answer
        prompts = [ids for row in rows if len(ids := prompt_of(row)) <= room][: sanity.ASKED]
        with candidate():
            after, unsound = self.row_losses.of(measured), self._unsound(prompts, most)
        with self.trained.untrained():
            before, unsound_base = self.row_losses.of(measured), self._unsound(prompts, most)
        sound = Health(unsound=unsound, unsound_base=unsound_base, asked=len(prompts))
        if not measured:  # the context is too short for the prompts
            return sound, {}
        tokens = supervised(measured)
        _check_finite("ability", sum(after))
        ability, high, skill, change = forgotten(
            after, before, tokens, self.retention.skills, seed=self.spec.hyper.seed
        )
        kept = {"candidate": after, "base": before, "tokens": tokens, "skills": self.retention.skills}
        return replace(sound, ability=ability, ability_high=high, skill=skill, skill_change=change), kept

    def _unsound(self, prompts: Sequence[Sequence[int]], most: int) -> int:
        tokenizer = self.prepared.base.tokenizer
        ends = end_tokens(self.trained.model, tokenizer)
        instructions = (
            tokenizer.encode(self.spec.instructions, add_special_tokens=False) if self.spec.instructions else []
        )
        said = answer(self.trained.model, prompts, most=most, ends=ends, check_stop=self.row_losses.check_stop)
        return sum(sanity.unsound(one, instructions, ends) for one in said)


def _question_and_answer(row: Row) -> tuple[str, str]:
    """The first question and its answer, shortened for a chat message."""
    turns = row.served.turns
    first = next(at for at, turn in enumerate(turns) if turn.message.role is Role.USER)
    asked, said = (turns[at].message.text if at < len(turns) else "" for at in (first, first + 1))
    return shorten(asked), shorten(said)


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"


def _check_finite(name: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise JobError("training.why_not_finite", f"the loss of {name} is not finite")
