"""An adapter that TRL's SFTTrainer has trained is imported and judged: better than base on rows that nobody saw."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from core.jobs import importing
from core.jobs.protocol import Judged, Spec, Warned
from finetune.imported import judge_imported
from finetune.prepare import prepare
from tests.bench.environments import TRL
from tests.finetune.conftest import Heard, faq
from tests.support.tiny import save_tiny

SCRIPT = Path(__file__).with_name("trl_adapter.py")
ENVIRONMENT = user_cache_path("distributary") / "bench" / TRL.replace("==", "-")
BUILD = "python -m tests.bench.finetune builds it"

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(not (ENVIRONMENT / "complete").is_file(), reason=f"no environment with {TRL} here: {BUILD}"),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj", "lora_dropout": 0.1},
    ],
    ids=["all linear", "q and v, rslora", "a regular expression"],
)
def test_what_trl_leaves_is_imported_with_its_checkpoints(tmp_path: Path, options: dict[str, object]) -> None:
    base = save_tiny(tmp_path / "base", initializer_range=0.05)
    job = tmp_path / "job"
    job.mkdir()
    (job / "data.jsonl").write_bytes(faq(120))
    spec = Spec("j1", str(base), "", "data.jsonl", "", "terminal@1", nice=0, ability=False, candidate="candidate")
    prepared = prepare(job, spec, Heard())
    lines = (job / "data.jsonl").read_text().splitlines()
    seen = [lines[prepared.encoded[number].line - 1] for number in prepared.split.train]
    (tmp_path / "seen.jsonl").write_text("\n".join(seen))

    left = tmp_path / "left"
    words = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    command = [ENVIRONMENT / "bin" / "python", "-P", SCRIPT, base, tmp_path / "seen.jsonl", left, *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(list(left.glob("checkpoint-*"))) > 1
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", left))

    importing._unpack_path(packed, job / "candidate")
    heard = Heard()
    judge_imported(job, replace(spec, ability=False), heard, threading.Event())
    (judged,) = heard.of(Judged)
    assert judged.loss < judged.loss_champion - 0.5
    assert judged.high < 0
    assert not heard.of(Warned)
    assert (job / "out" / importing.WEIGHTS).read_bytes() == (left / importing.WEIGHTS).read_bytes()
