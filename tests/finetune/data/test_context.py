"""No row is longer than the model takes: neither those that are trained nor what the gate makes of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from core.jobs.protocol import Checked, Done, Fresh, Judged, Spec
from core.model.chat_format import TrainingRow
from finetune.evaluation import retention_set
from finetune.evaluation.evaluator import Evaluator
from finetune.evaluation.retention_set import OwnAnswers
from finetune.modeling.base import find_base
from finetune.prepare import prepare
from finetune.training import train as loop
from tests.finetune.conftest import Heard, MakeJob
from tests.finetune.training.test_train import go
from tests.support.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Absolute positions: none is there for a token after the 160th."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=259, n_positions=160, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(n: int, long: int) -> bytes:
    """Every other question is long, and so is the answer to every other question; the last one is too long."""
    pairs = [{"q": f"{i}?{'q' * (long if i % 2 else 0)}", "a": f"{i}.{'a' * (0 if i % 2 else long)}"} for i in range(n)]
    return "".join(json.dumps(pair) + "\n" for pair in [*pairs, {"q": "?", "a": "a" * 200}]).encode()


@pytest.mark.slow
def test_rows_that_the_model_does_not_take_are_rejected_and_the_rest_is_trained(
    make_job: MakeJob, gpt2_folder: Path
) -> None:
    folder = make_job(data=rows(60, 70), base=gpt2_folder)
    heard = go(folder)
    (checked,) = heard.of(Checked)
    assert (checked.rows, checked.used) == (61, 60)
    assert "at most 160" in checked.rejected[0]
    assert heard.of(Done)


def test_answers_stand_under_other_questions_only_where_these_leave_room(make_job: MakeJob, gpt2_folder: Path) -> None:
    folder = make_job(data=rows(60, 70), base=gpt2_folder)
    prepared = prepare(folder, Spec.read(folder), Heard())
    own, other = prepared.part(prepared.split.test), prepared.swapped(prepared.split.test)
    assert max(len(row.ids) for row in other) <= 160
    assert sum(one.ids != two.ids for one, two in zip(own, other, strict=True)) == len(own)


def test_a_model_from_nothing_gets_rows_of_its_own_context(make_job: MakeJob) -> None:
    folder = make_job(data=rows(60, 0))
    spec = replace(Spec.read(folder), method="scratch", fresh=Fresh(layers=1, hidden=32, heads=4, context=100))
    folder.joinpath("data.jsonl").write_bytes(rows(60, 30))
    prepared = prepare(folder, replace(spec, data_sha256=""), Heard())
    assert max(len(row.ids) for row in prepared.rows) <= 100
    assert prepared.report.rejected == 1


def test_whole_answers_are_asked_for_where_there_is_room_for_them(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base", max_position_embeddings=130)
    row = TrainingRow((1, 50, 60, 2), (False, False, True, True))
    monkeypatch.setattr(loop, "own_answers", lambda *given: OwnAnswers((), (row,), ("facts",), "x"))
    asked: list[tuple[int, ...]] = []

    def unsound(self: Evaluator, prompts: Any, most: int) -> int:
        assert all(len(ids) + most <= 130 for ids in prompts)
        asked.extend(prompts)
        return 0

    monkeypatch.setattr(Evaluator, "_unsound", unsound)
    (judged,) = go(make_job(data=rows(60, 30), base=base, epochs=1), ability=True).of(Judged)
    assert 0 < judged.asked == len(asked) / 2 < 16


def test_a_model_of_relative_positions_alone_takes_whatever_is_set(make_job: MakeJob, tmp_path: Path) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(
        tmp_path / "base"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    folder = make_job(base=tmp_path / "base")
    assert find_base(Spec.read(folder), folder).context == sys.maxsize


@pytest.mark.slow
@pytest.mark.parametrize("most", [12, 155])
def test_the_base_is_asked_only_what_leaves_it_room_to_answer(
    most: int, make_job: MakeJob, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_set, "REHEARSED_TOKENS", most)
    monkeypatch.setattr(retention_set, "MEASURED_TOKENS", most)
    folder = make_job(data=rows(60, 30), base=gpt2_folder, epochs=1)
    asked = retention_set.asked(find_base(Spec.read(folder), folder), "")
    assert all(len(ids) + most <= 160 for ids in (*asked.rehearsed, *asked.measured))
    assert len(asked.skills) == len(asked.measured)
    assert bool(asked.measured) == bool(asked.rehearsed) == (most == 12)
    (judged,) = go(folder, ability=True).of(Judged)
    assert (judged.ability is not None) == (most == 12)
