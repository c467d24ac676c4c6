"""The job folder: what `serve` and the trainer process say to each other. Knows neither the store nor torch.

    jobs/<id>/spec.json    written once, by serve          jobs/<id>/data.jsonl   the data set, as brought
    jobs/<id>/lock         held by the trainer             jobs/<id>/checkpoint/  the trainer's own
    jobs/<id>/candidate/   an adapter that was trained elsewhere and is to be examined, where there is one
    jobs/<id>/out/         the adapter folder, complete once the event `finished` is out
    jobs/<id>/check/       a job folder of its own: of the check, before anybody has agreed to the job
    standard output        one event as JSON per line      standard input         its end means: checkpoint and exit

Exit status of the trainer: 0 finished, 3 interrupted (resume later), 1 failed (an event `failed` says why).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from core.config.keys import key
from core.config.sections import HyperParameters
from core.errors import JobError

SPEC_VERSION = 1
SHOWN = "shown.json"
PREVIEW = "preview.json"  # in the folder of a check: the rows that it chose to show
EXIT_FINISHED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 3


@dataclass(frozen=True, slots=True)
class Fresh:
    """Of a model that begins from nothing. `vocabulary` 0 is the tokenizer of the configured model."""

    layers: int = key(8, "transformer layers", ge=1, le=200)
    hidden: int = key(384, "width of the hidden state", ge=8, le=16_384)
    heads: int = key(6, "attention heads", ge=1, le=128)
    vocabulary: int = key(0, "tokens of a new tokenizer; 0 keeps that of the configured model", ge=0, le=500_000)
    context: int = key(1024, "tokens of the longest sequence", ge=16, le=131_072)


Method = Literal["lora", "full", "scratch"]  # a delta; all weights; all weights of a model drawn anew


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything a trainer needs to know. Paths are absolute, or relative to the job folder."""

    job: str
    model: str
    fingerprint: str
    data: str
    data_sha256: str
    label: str  # what the adapter will be called: name@version
    instructions: str = ""
    language: str = "en"  # of the sentences in its events
    champion: str = ""  # the folder of the version that answers now; "" is the base model
    champion_label: str = "base"
    candidate: str = ""  # the folder of an adapter from elsewhere: nothing is trained, it is only examined
    device: str = "cpu"
    dtype: str = "auto"  # float32 on a CPU, bfloat16 on a GPU; or one of the two
    threads: int = 1
    nice: int = 10
    ability: bool = True  # whether the gate looks at what the base could do, and at whole answers
    cache: str = ""  # a folder for what may be used by later jobs on the same base; "" is none
    hyper: HyperParameters = field(default_factory=HyperParameters)
    method: Method = "lora"
    fresh: Fresh = field(default_factory=Fresh)  # of the method "scratch"
    model_name: str = ""  # for people, and for the adapter's manifest; "" is the last name of `model`
    columns: dict[str, str] = field(default_factory=dict)  # of the data, where named: question, answer, system
    redact: bool = False  # a check takes personal data out of the rows, and looks at what is left
    warm_up: bool = True  # a check takes some steps, to tell how long the job will be
    version: int = SPEC_VERSION

    def write(self, folder: Path) -> None:
        aside = folder / "spec.json.new"
        aside.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        aside.replace(folder / "spec.json")

    @classmethod
    def find(cls, folder: Path) -> Spec | None:
        """The spec of a job folder; None where there is none that can be read."""
        try:
            return cls.read(folder)
        except JobError:
            return None

    @classmethod
    def read(cls, folder: Path) -> Spec:
        """Raises JobError for a missing, damaged or newer spec.json; it names the file and the key."""
        path = folder / "spec.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            unknown = set(known) - {f.name for f in fields(cls)}
            if known.get("version") != SPEC_VERSION or unknown:
                raise JobError(detail=f"{path}: version {known.get('version')!r}, unknown keys {sorted(unknown)}")
            inner = {"hyper": HyperParameters(**known["hyper"]), "fresh": Fresh(**known.get("fresh", {}))}
            return cls(**{**known, **inner})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise JobError(detail=f"{path} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Preview:
    """A row as it is trained, decoded from its token ids: what is taught (True) and what is only read. No event.

    `asked` and `said` are its last question and its first answer that is taught, without the template's marks.
    """

    line: int
    parts: tuple[tuple[bool, str], ...]
    asked: str
    said: str

    @staticmethod
    def dump(rows: Sequence[Preview]) -> str:
        return json.dumps([asdict(row) for row in rows], ensure_ascii=False)

    @staticmethod
    def load(text: str) -> tuple[Preview, ...]:
        """None where the text is none of ours."""
        try:
            return tuple(
                Preview(**{**row, "parts": tuple((bool(taught), str(part)) for taught, part in row["parts"])})
                for row in json.loads(text or "[]")
            )
        except (ValueError, TypeError, KeyError):
            return ()


@dataclass(frozen=True, slots=True)
class Checked:
    """The data set was read. `rejected` and `mended` hold "line 7: reason" for the person, the first of them.

    `personal` says what personal data was found in the rows that are used, a sentence for each kind. `histogram` counts
    rows by length, from the shortest to the longest, in steps of the same width.
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
    median_tokens: int = 0  # of a row as it is trained, its instructions included
    longest_tokens: int = 0
    missing: int = 0  # about so many more rows would be enough for a verdict
    shortest_tokens: int = 0
    histogram: tuple[int, ...] = ()
    doubled: tuple[int, ...] = ()  # the lines of the first duplicates


@dataclass(frozen=True, slots=True)
class Answered:
    """So many of our own prompts has the model answered as it is, before anything is trained."""

    kind: ClassVar[str] = "answered"
    done: int
    of: int


@dataclass(frozen=True, slots=True)
class Planned:
    """What is about to be done, before the first step. `tokens` are those of all epochs, rehearsal included."""

    kind: ClassVar[str] = "planned"
    steps: int
    tokens: int
    rows: int
    rehearsed: int  # rows of what the base can do, beside `rows`


@dataclass(frozen=True, slots=True)
class Estimated:
    """What a job would take, before anybody agrees to it. `tokens` are those of all epochs, rehearsal included.

    `seconds` and `memory_mib` come from steps that were really taken; 0 where none were: another job is at work.
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
    """Personal data was taken out; JOBDIR/`name` holds the rows that are left, and is another data set."""

    kind: ClassVar[str] = "redacted"
    name: str
    sha256: str
    rows: int
    replaced: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Of what people said, so many stored texts could not be read. Not of the trainer: it never saw them."""

    kind: ClassVar[str] = "left_out"
    unreadable: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`loss` and `first_loss` are means over the last and the first few steps: one step's rows say little."""

    kind: ClassVar[str] = "progress"
    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    tokens_per_s: float
    seconds_left: float
    grad_norm: float = 0.0
    clipped: float = 0.0  # the fraction of gradient values that clipping by value touched
    first_loss: float = 0.0  # 0 where it is not known


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Mean loss per assistant token on rows that training did not see."""

    kind: ClassVar[str] = "evaluated"
    step: int
    split: Literal["validation", "test"]
    loss: float
    rows: int
    who: Literal["base", "candidate"] = "candidate"


FEWEST_TEST_ROWS = 30  # below, an interval says more about chance than about the model
MOST_FORGOTTEN = 0.05  # nats per token of the base's own answers
MOST_OF_A_SKILL = 0.2  # the same of one skill: eight prompts say less than sixty-four, but one may not pay for the rest
Worse = tuple[int, float, float]  # (line of the data set, loss per token of the champion, of the candidate)
Verdict = Literal["passed", "no_better", "style_only", "forgets", "unsound", "too_few"]


@dataclass(frozen=True, slots=True)
class Judged:
    """The gate's verdict on rows that training did not see, against what the channel answers from now.

    Losses and lifts are means per token. `low` and `high` hold the difference of the losses, 95% sure. `ability` is how
    much more the candidate wonders at the base's own answers to generic prompts, in nats per token, at most
    `ability_high`, and `skill` is what lost most of all, by `skill_change`; None where it was not measured. `unsound`
    of `asked` answers were cut, looped or recited the prompt; `unsound_base` of the base's. `worst` are the rows that
    the champion knows better, worst first.
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
    """Whether too much of what the base could do is lost, of all of it or of one skill."""
    return not (ability_high <= MOST_FORGOTTEN and skill_change <= MOST_OF_A_SKILL)


@dataclass(frozen=True, slots=True)
class Shown:
    """What of the test rows may be shown to operators. No event: it holds text, and lies in JOBDIR/shown.json.

    `worst` are those of Judged with their question and answer, `unseen` some questions with theirs.
    """

    worst: tuple[tuple[int, float, float, str, str], ...] = ()
    unseen: tuple[tuple[str, str], ...] = ()

    def dump(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def load(cls, text: str) -> Shown:
        """Empty where the text is none of ours."""
        try:
            return cls(**{name: _tuples(value) for name, value in json.loads(text or "{}").items()})
        except (ValueError, TypeError, AttributeError):
            return cls()


@dataclass(frozen=True, slots=True)
class Warned:
    kind: ClassVar[str] = "warned"
    text: str


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing new, but it is at work: not kept, and told to nobody."""

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
    """`fault` is "yours" where the data is to blame, "settings" where a setting is, "ours" otherwise.

    `of_use`: whether what it had learned by then may be gone on from.
    """

    kind: ClassVar[str] = "failed"
    fault: Fault
    reason: str
    line: int = 0
    of_use: bool = True


JobEvent = (
    Checked
    | Estimated
    | Redacted
    | LeftOut
    | Answered
    | Planned
    | Progress
    | Evaluated
    | Judged
    | Warned
    | Alive
    | Done
    | Failed
)
_EVENTS: dict[str, Callable[..., JobEvent]] = {event.kind: event for event in get_args(JobEvent)}


def dump_event(event: JobEvent) -> str:
    """One line of JSON, without the newline."""
    return json.dumps({"kind": event.kind, **asdict(event)}, ensure_ascii=False, allow_nan=False)


def load_event(line: str) -> JobEvent:
    """Raises JobError for a line that is no event."""
    try:
        given = json.loads(line)
        event = _EVENTS[given.pop("kind")]
        return event(**{name: _tuples(value) for name, value in given.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise JobError(detail=f"not an event of the trainer: {line[:200]!r}") from error


def load_judged(given: Mapping[str, Any]) -> Judged | None:
    """The verdict as a version's manifest holds it; None where it holds none."""
    try:
        return Judged(**{name: _tuples(value) for name, value in given.items()})
    except TypeError:
        return None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
