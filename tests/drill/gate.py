"""Is the gate right? The real model and trainer on the company's questions, answers as they are and shuffled.

    python -m tests.drill.gate --folder DIR [--json FILE] [--seeds 5] [--only CASE ...]

Each case is a job folder under DIR, trained by `python -m finetune train` with the default settings (about nine minutes
of one core). One that has its result already is only judged again, by the gate as it is now; so a drill that was cut
goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from core.config.sections import HyperParameters
from core.jobs.protocol import MOST_FORGOTTEN, Judged, Spec
from core.model.demo import demo_folder
from finetune.evaluation.evaluator import SCORES
from finetune.evaluation.gate import Health, Scores, forgotten, judge
from finetune.evaluation.retention_set import PROMPTS

FEW = 20
SPOILT = ("no_better", "style_only", "forgets")  # the first that it fails gives the verdict its name
DROP = 0.75  # of the base's loss on the test rows: what an honest fine-tune ends below


@dataclass(frozen=True, slots=True)
class Case:
    """`expected` are the verdicts that are right."""

    name: str
    data: str
    hyper: HyperParameters
    expected: tuple[str, ...]
    ruined: bool = False  # by a learning rate of 1.0 that nothing stopped
    forgets: bool = False  # base ability must fail, whatever else does


def cases(seeds: int) -> Iterator[Case]:
    english = faq("faq-en.jsonl")
    for seed in range(1, seeds + 1):
        hyper = HyperParameters(seed=seed)
        yield Case(f"shuffled-{seed}", dump(shuffled(english, seed)), hyper, ("style_only", "no_better"))
        yield Case(f"as-they-are-{seed}", dump(english), hyper, ("passed",))
        if seed == 1:
            yield Case("few", dump(random.Random(seed).sample(english, FEW)), hyper, ("too_few",))
            swedish = HyperParameters(seed=seed, rehearsal=0)
            yield Case("swedish", dump(faq("faq.jsonl")), swedish, SPOILT, forgets=True)
            yield Case("ruined", dump(english), hyper, SPOILT, ruined=True, forgets=True)


def faq(name: str) -> list[dict[str, str]]:
    data = resources.files("zaragoza_construction_faq").joinpath(f"data/{name}").read_text(encoding="utf-8")
    return [{key: row[key] for key in ("q", "a")} for row in map(json.loads, data.splitlines())]


def shuffled(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Each question with another's answer; train, validation and test alike, since they are parted afterwards."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    answer_of = dict(zip(order, [*order[1:], order[0]], strict=True))  # one cycle: nobody keeps their own
    return [{"q": row["q"], "a": rows[answer_of[at]]["a"]} for at, row in enumerate(rows)]


def dump(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run(folder: Path, case: Case, model: Path) -> None:
    """Train the job, or what is left of it; of a ruined one only the gate. Nothing where its result is there."""
    job = folder / case.name
    if (job / SCORES).exists() and (job / "out").exists():
        return
    job.mkdir(parents=True, exist_ok=True)
    (job / "data.jsonl").write_text(case.data, encoding="utf-8")
    sha256 = hashlib.sha256(case.data.encode()).hexdigest()
    spec = Spec(
        case.name, str(model), "", "data.jsonl", sha256, "drill@1", cache=str(folder / "cache"), hyper=case.hyper,
        model_name=model.name, candidate="candidate" if case.ruined else "",
    )  # fmt: skip
    spec.write(job)
    if case.ruined:
        _process(job, [sys.executable, "-m", "tests.drill.ruin", str(job)])
    _process(job, [sys.executable, "-m", "finetune", "gate" if case.ruined else "train", str(job)])


def _process(job: Path, command: list[str]) -> None:
    with (job / "events.jsonl").open("a") as events, (job / "log").open("a") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=events, stderr=log, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        status = process.wait()  # its standard input stays open as long: the end of it would mean to stop
    if status:
        raise RuntimeError(f"{job.name}: status {status}: {(job / 'events.jsonl').read_text()[-2000:]}")


def report(folder: Path, case: Case) -> dict[str, Any]:
    """By the gate as it is now, from what was measured row by row then."""
    scores = json.loads((folder / case.name / SCORES).read_text("utf-8"))
    judged = judge_again(scores, seed=case.hyper.seed)
    base = sum(scores["base"]["own"]) / sum(scores["tokens"])
    fall = 1 - judged.loss / base
    right = judged.verdict in case.expected and (case.expected != ("passed",) or fall >= 1 - DROP)
    if case.forgets:
        right = right and (judged.ability_high > MOST_FORGOTTEN)
    kept = {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(judged).items() if name != "worst"}
    return {"case": case.name, "right": right, "expected": case.expected, "fall": round(fall, 4), **kept}


def judge_again(scores: dict[str, Any], *, seed: int) -> Judged:
    given, kept = scores["health"], scores["ability"]
    skills = kept.get("skills") or measured_skills()
    lost = forgotten(kept["candidate"], kept["base"], kept["tokens"], skills, seed=seed)
    health = Health(*lost, given["unsound"], given["unsound_base"], given["asked"])
    candidate, champion = (Scores(**scores[who]) for who in ("candidate", "champion"))
    return judge(
        candidate, champion, scores["tokens"], champion_label="base", seed=seed, health=health, lines=scores["lines"]
    )


def measured_skills() -> list[str]:
    given = tomllib.loads(PROMPTS.read_text("utf-8"))["measured"]
    return [skill for skill, prompts in given.items() for _ in prompts]


def drill(folder: Path, *, seeds: int, only: list[str]) -> dict[str, Any]:
    model = demo_folder(user_cache_path("distributary") / "bench")
    began = time.monotonic()
    found = []
    for case in cases(seeds):
        if not only or case.name in only:
            run(folder, case, model)
            found.append(report(folder, case))
            sys.stderr.write(json.dumps(found[-1]) + "\n")
    return {
        "right": all(one["right"] for one in found),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "cases": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    result = drill(given.folder.absolute(), seeds=given.seeds, only=given.only)
    text = json.dumps(result, indent=2)
    if given.json:
        given.json.write_text(text, encoding="utf-8")
    sys.stdout.write(text + "\n")
    sys.exit(not result["right"])


if __name__ == "__main__":
    main()
