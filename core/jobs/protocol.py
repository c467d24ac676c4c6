"""The protocol of `serve` and the trainer process: the job folder and the events.

    jobs/<id>/spec.json    written by serve                jobs/<id>/data.*       the data set
    jobs/<id>/lock         held by the trainer             jobs/<id>/checkpoint/  written by the trainer
    jobs/<id>/candidate/   an adapter from elsewhere that is evaluated instead of a training
    jobs/<id>/out/         the adapter folder, complete once the event `finished` is sent
    jobs/<id>/check/       the job folder of the check
    standard output        one event as JSON per line      standard input         end of file: checkpoint and exit

Exit status of the trainer: 0 finished, 3 interrupted (resume later), 1 failed (an event `failed` has the reason).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from core.config.keys import key
from core.config.sections import HyperParameters
from core.errors import JobError

SHOWN = "shown.json"
PREVIEW = "preview.json"  # in the check folder: sample rows
EXIT_FINISHED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 3


@dataclass(frozen=True, slots=True)
class Fresh:
    """A model with random weights. `vocabulary` 0: the tokenizer of the configured model."""

    layers: int = key(8, "transformer layers", ge=1, le=200)
    hidden: int = key(384, "width of the hidden state", ge=8, le=16_384)
    heads: int = key(6, "attention heads", ge=1, le=128)
    vocabulary: int = key(0, "tokens of a new tokenizer; 0 keeps that of the configured model", ge=0, le=500_000)
    context: int = key(1024, "tokens of the longest sequence", ge=16, le=131_072)


Method = Literal["lora", "full", "scratch"]  # adapter; all weights; all weights from random ones


@dataclass(frozen=True, slots=True)
class Spec:
    """The order to a trainer, spec.json. Paths are absolute or relative to the job folder."""

    job: str
    model: str
    fingerprint: str
    data: str
    data_sha256: str
    label: str  # name@version of the adapter
    instructions: str = ""
    language: str = "en"  # of the sentences in events
    champion: str = ""  # folder of the version that answers now; "": the base model
    champion_label: str = "base"
    candidate: str = ""  # folder of an adapter from elsewhere to evaluate; "": train one
    device: str = "cpu"
    dtype: str = "auto"  # float32 on a CPU, bfloat16 on a GPU; or one of the two
    threads: int = 1
    nice: int = 10
    ability: bool = True  # the gate measures ability and generated answers
    cache: str = ""  # folder for results that later jobs on the same base reuse; "": none
    hyper: HyperParameters = field(default_factory=HyperParameters)
    method: Method = "lora"
    fresh: Fresh = field(default_factory=Fresh)  # of the method "scratch"
    model_name: str = ""  # in the manifest and in messages; "": the last part of `model`
    columns: dict[str, str] = field(default_factory=dict)  # question, answer, system -> column of the data
    redact: bool = False  # the check removes personal data first
    warm_up: bool = True  # the check measures some training steps
    version: Literal[1] = 1

    def write(self, folder: Path) -> None:
        new = folder / "spec.json.new"
        new.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        new.replace(folder / "spec.json")

    @classmethod
    def find(cls, folder: Path) -> Spec | None:
        """The spec of a job folder; None where it cannot be read."""
        try:
            return cls.read(folder)
        except JobError:
            return None

    @classmethod
    def read(cls, folder: Path) -> Spec:
        """Raises JobError, with the file and the key, where spec.json is missing, damaged or of a newer version."""
        path = folder / "spec.json"
        try:
            return _SPEC.validate_json(path.read_bytes(), extra="forbid")
        except (OSError, ValueError) as error:
            raise JobError(detail=f"{path} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Preview:
    """A row as it is trained, decoded: parts that are learned (True) or not; its last question, its first answer."""

    line: int
    parts: tuple[tuple[bool, str], ...]
    question: str
    answer: str

    @staticmethod
    def dump(rows: Sequence[Preview]) -> str:
        return json.dumps([asdict(row) for row in rows], ensure_ascii=False)

    @staticmethod
    def load(text: str) -> tuple[Preview, ...]:
        """The rows, or none where the text cannot be read."""
        try:
            return _PREVIEWS.validate_json(text)
        except ValidationError:
            return ()


@dataclass(frozen=True, slots=True)
class Checked:
    """The report on a data set. `rejected` and `mended` hold the first "line 7: reason" of each.

    `personal` has a sentence for each kind of personal data that was found. `histogram` counts rows by length, from the
    shortest to the longest in steps of equal width.
    """

    kind: ClassVar[str] = "checked"
    rows: int
    used: int
    duplicates: int
    tokens: int
    train: int
    validation: int
    test: int
    rejected: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    personal: tuple[str, ...] = ()
    median_tokens: int = 0  # of a row as it is trained, instructions included
    longest_tokens: int = 0
    missing: int = 0  # rows that a verdict needs in addition, about
    shortest_tokens: int = 0
    histogram: tuple[int, ...] = ()
    doubled: tuple[int, ...] = ()  # lines of the first duplicates


@dataclass(frozen=True, slots=True)
class Answered:
    """The base model has answered `done` of `of` generic prompts, from which the rehearsal rows are made."""

    kind: ClassVar[str] = "answered"
    done: int
    of: int


@dataclass(frozen=True, slots=True)
class Planned:
    """The training to come. `tokens` counts all epochs, rehearsal included."""

    kind: ClassVar[str] = "planned"
    steps: int
    tokens: int
    rows: int
    rehearsed: int  # rows of the base model's own answers, beside `rows`


@dataclass(frozen=True, slots=True)
class Estimated:
    """What training would take. `tokens` counts all epochs, rehearsal included.

    `seconds` and `memory_mib` are measured on some steps; 0 where none were taken because another job is training.
    """

    kind: ClassVar[str] = "estimated"
    rows: int
    rehearsed: int
    epochs: int
    steps: int
    tokens: int
    seconds: float = 0.0
    memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Redacted:
    """Personal data was removed: JOBDIR/`name` holds the new data set."""

    kind: ClassVar[str] = "redacted"
    name: str
    sha256: str
    rows: int
    replaced: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Stored texts that could not be decrypted. `serve` adds this event; the trainer sends none."""

    kind: ClassVar[str] = "left_out"
    unreadable: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`loss` and `first_loss` are means over the last and the first few steps."""

    kind: ClassVar[str] = "progress"
    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    tokens_per_s: float
    seconds_left: float
    grad_norm: float = 0.0
    clipped: float = 0.0  # fraction of gradient values that were clipped
    first_loss: float = 0.0  # 0: unknown


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Mean loss per assistant token on rows that were held out."""

    kind: ClassVar[str] = "evaluated"
    step: int
    split: Literal["validation", "test"]
    loss: float
    rows: int
    who: Literal["base", "candidate"] = "candidate"


FEWEST_TEST_ROWS = 30  # with fewer, the confidence interval is too wide for a verdict
MOST_FORGOTTEN = 0.05  # nats per token on the base model's own answers
MOST_OF_A_SKILL = 0.2  # the same for one skill, measured on 8 prompts of 64
Worse = tuple[int, float, float]  # (line of the data set, loss per token of the champion, of the candidate)
Verdict = Literal["passed", "no_better", "style_only", "forgets", "unsound", "too_few"]


@dataclass(frozen=True, slots=True)
class Judged:
    """The gate's verdict on the test rows, against the version that answers in the channel now (the champion).

    Losses and lifts are means per token. `low` and `high` bound the difference of the losses with 95 % confidence.
    `ability`: rise in loss (nats per token) on the base model's own answers to generic prompts, at most `ability_high`;
    `skill` has the largest rise, `skill_change`; None where it was not measured. `unsound` of `asked` generated answers
    were cut, looped or recited the prompt; `unsound_base` of the base model's. `worst` are the rows with the largest
    rise in loss against the champion, worst first.
    """

    kind: ClassVar[str] = "judged"
    verdict: Verdict
    rows: int
    better: int
    champion: str
    loss_champion: float
    loss: float
    low: float
    high: float
    lift_champion: float
    lift: float
    ability: float | None = None
    ability_high: float = 0.0
    skill: str = ""
    skill_change: float = 0.0
    unsound: int = 0
    unsound_base: int = 0
    asked: int = 0
    worst: tuple[Worse, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def forgets(ability_high: float, skill_change: float) -> bool:
    """Whether the candidate loses too much of the base model's ability, over all or in one skill."""
    return not (ability_high <= MOST_FORGOTTEN and skill_change <= MOST_OF_A_SKILL)


@dataclass(frozen=True, slots=True)
class Shown:
    """Test rows that operators may see, JOBDIR/shown.json: `worst` of Judged with their texts, `unseen` others."""

    worst: tuple[tuple[int, float, float, str, str], ...] = ()
    unseen: tuple[tuple[str, str], ...] = ()

    def dump(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def load(cls, text: str) -> Shown:
        """Empty where the text cannot be read."""
        try:
            return _SHOWN.validate_json(text)
        except ValidationError:
            return cls()


@dataclass(frozen=True, slots=True)
class Warned:
    kind: ClassVar[str] = "warned"
    text: str


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life without news; it is not stored."""

    kind: ClassVar[str] = "alive"


@dataclass(frozen=True, slots=True)
class Done:
    kind: ClassVar[str] = "finished"
    steps: int
    seconds: float
    train_loss_first: float
    train_loss_last: float
    test_loss_base: float | None = None
    test_loss: float | None = None


Fault = Literal["yours", "settings", "ours"]


@dataclass(frozen=True, slots=True)
class Failed:
    """`fault`: "yours" for the data, "settings" for a setting, "ours" for anything else.

    `of_use`: whether a resumed job may continue from the checkpoint.
    """

    kind: ClassVar[str] = "failed"
    fault: Fault
    reason: str
    line: int = 0
    of_use: bool = True


Newest = Checked | Estimated | Redacted | LeftOut | Answered | Planned | Done | Failed  # a later one replaces them
JobEvent = Newest | Progress | Evaluated | Judged | Warned | Alive
_EVENTS: dict[str, TypeAdapter[JobEvent]] = {event.kind: TypeAdapter(event) for event in get_args(JobEvent)}
_JUDGED, _SPEC, _SHOWN = TypeAdapter(Judged), TypeAdapter(Spec), TypeAdapter(Shown)
_PREVIEWS = TypeAdapter(tuple[Preview, ...])


def dump_event(event: JobEvent) -> str:
    """One line of JSON, without the newline."""
    return json.dumps({"kind": event.kind, **asdict(event)}, ensure_ascii=False, allow_nan=False)


def load_event(line: str) -> JobEvent:
    """Raises JobError for a line that is no event."""
    try:
        given = json.loads(line)
        return _EVENTS[given.pop("kind")].validate_python(given, extra="forbid")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise JobError(detail=f"not an event of the trainer: {line[:200]!r}") from error


def load_judged(given: Mapping[str, Any]) -> Judged | None:
    """The verdict in a version's manifest; None where there is none."""
    try:
        return _JUDGED.validate_python(given, extra="forbid")
    except ValidationError:
        return None
