"""Data sets as people bring them: five shapes, two containers, and a zoo of broken ones."""

from __future__ import annotations

import gzip
import json
import re
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune
from core.errors import BadDataset
from core.i18n.messages import say
from core.types import Message, Role
from finetune.data import lines
from finetune.data.formats.json_lines import MAX_DEPTH, parse_json
from finetune.data.reader import read
from finetune.data.records import BadRecord, bare, read_record, under_instructions
from finetune.data.split import split
from tests.finetune.conftest import faq

ASKED, SAID = Message(Role.USER, "How?"), Message(Role.ASSISTANT, "So.")
SHAPES = [
    {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How?"}]},
            {"role": "model", "content": "So."},
        ]
    },
    {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]},
    {"prompt": "How?", "completion": " So."},
    {"prompt": [{"role": "user", "content": "How?"}], "completion": [{"role": "assistant", "content": "So."}]},
    {"instruction": "How?", "input": "", "output": "So."},
    {"question": "How?", "answer": "So.", "id": 7},
    {"id": "x", "q": "How?", "a": "So.", "sources": ["y"], "related_service": None},
]


def package(name):
    return resources.files("zaragoza_construction_faq").joinpath("data", name).read_bytes()


def refusal(tmp_path, content):
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(BadDataset) as caught:
        read(path)
    return caught.value.fields["line"], caught.value.fields["reason"].render("en")


def report(tmp_path, content):
    path = tmp_path / "data"
    path.write_bytes(content)
    return read(path)[1]


@pytest.mark.parametrize("record", SHAPES, ids=lambda r: "+".join(r))
def test_every_shape_gives_the_same_conversation(record):
    conversation, mended = read_record(record)
    assert conversation.messages == (ASKED, SAID)
    assert [turn.taught for turn in conversation.turns] == [False, True]
    assert mended == ()


@pytest.mark.parametrize("record", SHAPES, ids=lambda r: "+".join(r))
def test_a_system_turn_may_stand_beside_every_shape(record):
    conversation, mended = read_record({"system": "Be brief.", **record})
    assert conversation.messages == (Message(Role.SYSTEM, "Be brief."), ASKED, SAID)
    assert mended == ()


@pytest.mark.parametrize("name", ["faq-en.jsonl", "faq-en-alpaca.jsonl", "faq-en-sharegpt.jsonl", "faq-en.csv"])
def test_the_companys_faq_is_read_as_it_is(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(package(name))
    conversations, found = read(path)
    assert (found.rows, found.used, found.rejected, found.mended) == (503, 503, 0, 0)
    assert conversations[0].messages[0].text == "What is a bygglov (building permit)?"
    assert conversations[0].line == (2 if name.endswith("csv") else 1)


def test_all_four_files_hold_the_same_conversations(tmp_path):
    keys = []
    for name in ("faq-en.jsonl", "faq-en-alpaca.jsonl", "faq-en-sharegpt.jsonl", "faq-en.csv"):
        (tmp_path / name).write_bytes(package(name))
        keys.append([conversation.key for conversation in read(tmp_path / name)[0]])
    assert all(one == keys[0] for one in keys)


def test_gzip_is_read_like_the_plain_file(tmp_path):
    assert report(tmp_path, gzip.compress(faq(30))) == report(tmp_path, faq(30))


def test_a_semicolon_and_quoted_line_breaks_are_csv(tmp_path):
    rows = "".join(f'"What; is\n{i}?";"It is {i}."\r\n' for i in range(12))
    (tmp_path / "data").write_text("Question;Answer\r\n" + rows, encoding="utf-8-sig", newline="")
    conversations, found = read(tmp_path / "data")
    assert found.used == 12
    assert [conversation.line for conversation in conversations[:3]] == [2, 4, 6]


def test_weights_choose_what_is_taught():
    turns = [("user", "a", 1), ("assistant", "b", 0), ("user", "c", 1), ("assistant", "d", 1)]
    record = {"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]}
    assert [turn.taught for turn in read_record(record)[0].turns] == [False, False, False, True]


def test_what_cannot_be_used_says_why() -> None:
    for record, reason in [
        ([], "a list"),
        ({}, "none of the known keys"),
        ({"q": "How?", "a": None}, "none of the known keys"),
        ({"q": "How?", "a": 5}, "a is a number"),
        ({"q": "How?", "a": "  "}, "assistant is empty"),
        ({"messages": []}, "empty one"),
        ({"messages": ["x"]}, "message 1 is a text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "neither 0 nor 1"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "does not begin with the user"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "more than text"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "system", "content": "y"},
                    {"role": "assistant", "content": "z"},
                ]
            },
            "after the beginning",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "z", "weight": 0}]},
            "no answer with a weight of 1",
        ),
    ]:
        with pytest.raises(BadRecord, match=reason):
            read_record(record)


def test_what_can_be_mended_is_mended_and_told():
    record = {
        "messages": [
            {"role": "user", "content": "a\0\ud83d"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ]
    }
    conversation, mended = read_record(record)
    assert conversation.messages == (Message(Role.USER, "a\ufffd\n\nb"), Message(Role.ASSISTANT, "c"))
    assert len(mended) == 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"q": NaN, "a": "x"}', "NaN is not JSON"),
        (b'{"q": -Infinity, "a": "x"}', "-Infinity is not JSON"),
        (b'{"q": "x", "a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"q": ' + b"[" * 60000 + b"]" * 60000 + b"}", "nested deeper|longer than"),
        (b'{"q": ' + b"[" * 9 + b"]" * 9 + b"}", "nested deeper"),
        (b'{"q": "\xff", "a": "x"}', "not in UTF-8"),
        (b'{"q": "x", "a": "y"', "not JSON"),
        (b'{"q": "x", "a": "' + b"y" * 70000 + b'"}', "longer than 65,536 bytes"),
        (b"null", "empty"),
        (b'"text"', "a text"),
    ],
)
def test_a_broken_line_is_rejected_with_its_number_and_the_rest_is_used(tmp_path, line, reason):
    found = report(tmp_path, faq(15) + line + b"\n" + faq(30))
    assert (found.used, found.duplicates, found.rejected) == (30, 15, 1)
    where, _, why = found.rejections[0].render("en").partition(": ")
    assert where == "line 16"
    assert any(part in why for part in reason.split("|"))


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"", 0, "empty"),
        (b"\n\n \n", 0, "empty"),
        (b"\xff\xfe{\x00", 0, "UTF-16"),
        (b'[{"q": "x"}]', 1, "JSON list"),
        (b"hello, world\n", 1, "neither JSONL nor a table"),
        (b"\x89PNG\r\n\x1a\n\0\0", 1, "not in UTF-8"),
        (b"%PDF-1.7\n%\xe2\xe3\n", 0, "not a text file"),
        (b"MZ\x90\0\x03\0", 0, "not a text file"),
        (b"PK\x03\x04\x14\0\x06\0", 0, "an Excel file"),
        (faq(5), 0, "5 usable rows, at least 10 are needed"),
        (faq(5) + b"{}\n", 6, "5 usable rows, at least 10 are needed (1 rejected"),
        (faq(12) + b"{}\n" * 30, 13, "30 of 42 rows"),
        (gzip.compress(faq(300))[:-20], 1, "damaged or cut off"),
        (b"\x1f\x8bnot gzip", 1, "damaged or cut off"),
        (b"q,a\n" + b'"open,' + b"x" * 70000, 2, "longer than"),
        (b"q,a\n" + b'"open,\n' + b"xxxxxxxxx\n" * 9000, 2, "not CSV"),
        (b"q,a,q\n1,2,3\n", 1, "same name"),
        (b"{" + b"x" * 70000, 1, "first line is longer"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(tmp_path, content, line, reason):
    where, why = refusal(tmp_path, content)
    assert reason in why
    assert where == line or reason == "damaged or cut off"


def test_a_gzip_bomb_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_BYTES", 10**6)
    bomb = gzip.compress(faq(20) + b" " * 50_000_000)
    assert len(bomb) < 100_000
    assert "more than 1 MB unpacked" in refusal(tmp_path, bomb)[1]


def test_too_many_lines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINES", 20)
    assert refusal(tmp_path, faq(30)) == (21, "more than 20 lines")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_whatever_the_bytes_only_bad_dataset_comes_out(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    with pytest.raises(BadDataset):
        read(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "q", "a"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "completion", "q", "a", "x"]), VALUES))
def test_whatever_the_record_a_conversation_or_bad_record_comes_out(record):
    try:
        conversation, _ = read_record(record)
    except BadRecord:
        return
    roles = [message.role for message in conversation.messages if message.role is not Role.SYSTEM]
    assert roles[0] is Role.USER
    assert roles[-1] is Role.ASSISTANT
    assert all(message.text.strip() for message in conversation.messages)


@given(VALUES)
def test_json_that_is_accepted_is_what_json_says(value):
    line = json.dumps(value).encode()
    try:
        assert parse_json(line) == value
    except BadRecord:
        assert b"NaN" in line or b"Infinity" in line or line.count(b"[") + line.count(b"{") > MAX_DEPTH


def test_instructions_stand_before_rows_without_a_system_turn_only():
    plain = read_record({"q": "How?", "a": "So."})[0]
    own = read_record({"system": "S", "instruction": "How?", "output": "So."})[0]
    served = under_instructions(plain, "Be brief.")
    assert served.messages == (Message(Role.SYSTEM, "Be brief."), ASKED, SAID)
    assert served.key == plain.key
    assert under_instructions(own, "Be brief.") is own
    assert under_instructions(plain, "") is plain


def test_near_doubles_are_used_told_and_in_one_part_of_the_split(tmp_path):
    asked = [(f"How long does permit {i} take?", f"HOW LONG  does “permit {i}” take") for i in range(150)]
    rows = [{"q": q, "a": f"Permit {i} takes {i * 3 % 41} days."} for i, pair in enumerate(asked) for q in pair]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    conversations, found = read(path)
    assert (found.used, found.duplicates, found.near, found.first_near) == (300, 0, 150, 2)
    assert "150 (first in line 2)" in found.noted()[0].render("en")
    parts = split([one.key for one in conversations])
    part_of = {row: name for name in ("train", "validation", "test") for row in getattr(parts, name)}
    assert all(part_of[row] == part_of[row + 1] for row in range(0, 300, 2))


def test_texts_that_differ_in_case_punctuation_and_spaces_are_near_doubles() -> None:
    for one, other in [
        ("How long?", "HOW  LONG"),
        ("E-mail: a.b", "email\na b"),
        ("Straße", "STRASSE."),
        ("\uff28ow\u200b\u2026", "how"),  # wide letters, a space of no width
        ("caf\u00e9", "CAFE\u0301!"),
        ("费用是多少？", "费用 是多少"),
    ]:
        assert bare(one) == bare(other)


def test_texts_that_say_something_else_are_none() -> None:
    for one, other in [("?", "!"), ("...", "?"), ("C++", "C"), ("कि", "का"), ("5 €", "5 $")]:
        assert bare(one) != bare(other)


def test_every_reason_has_its_sentence():
    root = Path(finetune.__file__).parent
    used = {
        key
        for path in root.rglob("*.py")
        for key in re.findall(
            r'(?:BadRecord\(|\.note\(|bad\([^,()]+(?:\([^)]*\))?, |Lazy\("data\.)"?(\w+)"', path.read_text("utf-8")
        )
    }
    warned = re.findall(r'_warn\("(\w+)"', (root / "training" / "train.py").read_text("utf-8"))
    refused = re.findall(
        r'refused\((?:self\.)?spec, "(\w+)"', "".join(path.read_text("utf-8") for path in root.rglob("*.py"))
    )
    keys = {f"data.{key}" for key in (*used, *refused)} | {f"data.warn_{key}" for key in warned}
    assert len(keys) > 40
    assert [key for key in sorted(keys) if say("en", key) == key] == []


def test_reasons_are_told_in_the_language_of_who_asked(tmp_path):
    found = report(tmp_path, faq(30) + b"oops\n")
    assert found.rejections[0].render("zh").startswith("第 31 行：不是 JSON")
    with pytest.raises(BadDataset) as caught:
        report(tmp_path, faq(3) + b"oops\n" * 5)
    assert "第 4 行：" in caught.value.fields["reason"].render("zh")


def test_personal_data_is_counted_over_the_file_with_its_first_line(tmp_path):
    rows = [{"q": f"Question {i}?", "a": f"Answer {i}"} for i in range(12)]
    rows[4]["a"] = "Write to ana@example.org"
    rows[9]["q"] = "Is it ana@example.org or leo@example.org?"
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = read(path)
    assert [one.render("en") for one in report.personal_data()] == ["mail addresses: 3 (first in line 5)"]
