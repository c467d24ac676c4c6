"""A data set without personal data: the same rows, turns and weights; nothing of what is found is left."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import BadDataset
from core.jobs.protocol import Checked, Redacted, Spec
from finetune.data.personal import find, redact
from finetune.data.reader import read
from finetune.data.redact import write_redacted
from finetune.prepare import prepare
from tests.finetune.conftest import Heard, MakeJob

PIECES = (
    "ana@example.org",
    "+34 976 123 456",
    "4111 1111 1111 1111",
    "DE89 3704 0044 0532 0130 00",
    "sk-" + "a1" * 12,
    "xoxb-1234567890-abc",
    "123456789:" + "A" * 35,
    "13912345678",
    "a permit",
    "2026",
    "-",
    ".",
)


def data(rows: int = 12) -> bytes:
    lines = [
        {
            "messages": [
                {"role": "system", "content": "Answer for ana@example.org."},
                {"role": "user", "content": f"Call +34 976 123 {i:03}?"},
                {"role": "assistant", "content": f"Not {i}.", "weight": 0},
                {"role": "user", "content": "And a mail?"},
                {"role": "assistant", "content": f"To leo{i}@example.org or ana@example.org, {i}."},
            ]
        }
        for i in range(rows)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_all_rows_turns_and_weights_stay_and_what_was_found_is_gone(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(data())
    conversations, _ = read(tmp_path / "data")
    told = write_redacted(conversations, tmp_path)
    content = (tmp_path / told.name).read_bytes()
    assert told == Redacted("redacted.jsonl", hashlib.sha256(content).hexdigest(), 12, 12 * 4)
    again, report = read(tmp_path / told.name)
    assert report.personal_data() == []
    assert [turn.message.text for turn in again[3].turns] == [
        "Answer for [mail].", "Call [phone]?", "Not 3.", "And a mail?", "To [mail] or [mail], 3.",
    ]  # fmt: skip
    for one, other in zip(conversations, again, strict=True):
        assert [(turn.message.role, turn.taught) for turn in one.turns] == [
            (turn.message.role, turn.taught) for turn in other.turns
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "redacted.jsonl"]


def test_a_job_that_is_to_be_redacted_is_checked_on_what_is_left(make_job: MakeJob) -> None:
    folder = make_job(data=data())
    heard = Heard()
    prepared = prepare(folder, replace(Spec.read(folder), redact=True), heard)
    redacted, checked = heard
    assert (type(redacted), type(checked)) == (Redacted, Checked)
    assert checked.personal == ()
    assert not any("example.org" in message.text for row in prepared.encoded for message in row.served.messages)


def test_rows_that_are_the_same_without_it_are_doubles_and_too_few_are_refused(make_job: MakeJob) -> None:
    rows = [{"q": f"Who is user{i}@example.org?", "a": "Nobody."} for i in range(30)]
    folder = make_job(data="".join(json.dumps(row) + "\n" for row in rows).encode())
    with pytest.raises(BadDataset) as caught:
        prepare(folder, replace(Spec.read(folder), redact=True), Heard())
    assert "1 usable row," in caught.value.fields["reason"].render("en")


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(["", " ", ", ", "\n", "(", ")", "/"])), max_size=8))
@example([("13912345678", ""), ("ana@example.org", "")])
def test_nothing_is_left_to_find(pieces: list[tuple[str, str]]) -> None:
    text = "".join(piece + separator for piece, separator in pieces)
    redacted, count = redact(text)
    assert find(redacted) == {}
    assert count == find(text).total()
    assert redact(redacted) == (redacted, 0)
