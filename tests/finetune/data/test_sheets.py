"""Tables as people export them: separators, quotes, what Excel writes first, and which column is which."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import BadDataset
from core.types import Role
from finetune.data.reader import read
from finetune.data.records import ANSWER, QUESTION, BadRecord, read_record
from finetune.data.sheets import SEPARATORS, rows

SPECIAL = [';,\t|"', "two\nlines", '""', "'", " spaces ", "=1+1", "sep=;"]
NAMED = {"question": "Customer says", "answer": "We say", "system": "Tone"}


def table(path: Path, header: list[str], separator: str, body: list[list[str]], before: str = "") -> Path:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="\r\n").writerows([header, *body])
    path.write_text(before + out.getvalue(), encoding="utf-8-sig", newline="")
    return path


def said(path: Path, columns: dict[str, str] | None = None) -> list[tuple[str, ...]]:
    return [tuple(message.text for message in one.messages) for one in read(path, columns)[0]]


def refusal(path: Path, columns: dict[str, str] | None = None) -> tuple[int, str]:
    with pytest.raises(BadDataset) as caught:
        read(path, columns)
    return caught.value.fields["line"], caught.value.fields["reason"].render("en")


BODY = [[f"{what} {i}?", f"It is {what} {i}."] for i, what in enumerate(2 * SPECIAL)]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_every_separator_is_found_and_cells_keep_what_looks_like_one(tmp_path: Path, separator: str) -> None:
    found = said(table(tmp_path / "t", ["Question", "Answer"], separator, BODY))
    assert found == [(asked.strip(), answer) for asked, answer in BODY]


@pytest.mark.parametrize("separator", [*SEPARATORS, "^", "~"])
def test_what_excel_says_of_the_separator_holds_and_lines_are_still_those_of_the_file(
    tmp_path: Path, separator: str
) -> None:
    body = [*BODY, ["too", "many", "cells"]]
    path = table(tmp_path / "t", ["q", "a"], separator, body, before=f"SEP={separator}\r\n")
    assert said(path) == [(asked.strip(), answer) for asked, answer in BODY]
    (rejected,) = read(path)[1].rejections
    broken = sum(cell.count("\n") for row in BODY for cell in row)
    assert rejected.render("en").startswith(f"line {3 + len(BODY) + broken}: ")


@pytest.mark.parametrize("separator", ['"', "x", " ", "\r", "\0"])
def test_what_cannot_separate_is_no_separator(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(f"sep={separator}\nq{separator}a\n1{separator}2\n".encode())
    reason = "not a text file" if separator == "\0" else "neither JSONL nor a table"
    assert reason in refusal(path)[1]


def test_named_columns_are_found_whatever_their_case_and_spaces_and_others_are_left(tmp_path: Path) -> None:
    body = [[str(i), f"Q {i}?", "not this", f"A {i}", "Be brief."] for i in range(12)]
    path = table(tmp_path / "t", ["id", " customer  SAYS ", "answer", "We say", "tone"], ";", body)
    assert said(path, NAMED)[3] == ("Be brief.", "Q 3?", "A 3")
    assert read(path, NAMED)[0][3].messages[0].role is Role.SYSTEM


def test_a_named_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = table(tmp_path / "t", ["Question", "Answer"], ",", BODY)
    line, reason = refusal(path, {"question": "Question", "answer": "We say"})
    assert line == 1
    assert "no column We say; there are Question, Answer" in reason


def test_keys_may_be_named_in_json_too_and_the_system_is_of_those_rows_that_have_one(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"customer says": f"Q {i}", "We say": f"A {i}", "q": "no"} for i in range(12)]
    lines[4]["tone"] = "Be brief."
    lines.append({"q": "Q", "a": "A"})
    path = tmp_path / "t"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert said(path, NAMED)[3:5] == [("Q 3", "A 3"), ("Be brief.", "Q 4", "A 4")]
    assert [one.render("en") for one in read(path, NAMED)[1].rejections] == ["line 13: there is no key Customer says"]


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("Frage", "Antwort"),
        ("Fråga", "Svar"),
        ("问题", "答案"),
        ("Customer", "Agent"),
        ("INPUT", "Target"),
        ("q", "Reply"),
    ],
)
def test_other_names_of_a_question_and_its_answer_are_known(tmp_path: Path, asked: str, answer: str) -> None:
    path = table(tmp_path / "t", ["id", answer, asked], ",", [["1", f"A {i}", f"Q {i}"] for i in range(12)])
    assert said(path)[3] == ("Q 3", "A 3")
    assert read_record({"id": 1, answer: "A", asked: "Q"})[0].messages[0].text == "Q"


@pytest.mark.parametrize("names", [("ask", "user", "reply"), ("ask", "reply", "svar"), ("ask",), ("reply", "note")])
def test_where_there_is_doubt_nothing_is_guessed(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = table(tmp_path / "t", list(names), ",", [["x"] * len(names)] * 12)
    assert "name them: `/finetune FILE question=... answer=...`" in refusal(path)[1]
    with pytest.raises(BadRecord):
        read_record(dict.fromkeys(names, "x"))


def test_no_name_is_of_both() -> None:
    assert not QUESTION & ANSWER


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=20)


@given(st.sampled_from(SEPARATORS), st.lists(st.tuples(CELLS, CELLS), max_size=8))
def test_whatever_the_cells_they_come_back_as_they_were(separator: str, body: list[tuple[str, str]]) -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([("question", "answer"), *body])
    lines = io.StringIO(out.getvalue(), newline="\n")
    read_back = [record for _, record in rows(iter(lines), lambda: 1, {}, limit=1000)]
    kept = [row for row in body if any(cell.strip() for cell in row)]
    assert read_back == [{"question": asked, "answer": answer} for asked, answer in kept]
