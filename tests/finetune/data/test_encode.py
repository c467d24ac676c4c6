"""What is taught: the answers and the tokens that end them, and nothing else, rendered as it is served."""

from __future__ import annotations

import pytest

from core.model.chat_format import render
from core.types import Message, Role
from finetune.data.encode import encode, encode_one
from finetune.data.reader import Report
from finetune.data.records import BadRecord, read_record, under_instructions

END = 2  # <|im_end|>


def conversation(*turns, instructions=""):
    record = {"messages": [{"role": r, "content": c, **({"weight": w} if w is not None else {})} for r, c, w in turns]}
    return under_instructions(read_record(record)[0], instructions)


def taught_text(row, tokenizer):
    return tokenizer.decode([i for i, taught in zip(row.ids, row.supervised, strict=True) if taught])


def test_answers_and_their_ends_are_taught(tokenizer):
    row, kept = encode_one(
        conversation(("user", "one", None), ("assistant", "two", None), ("user", "x", None), ("assistant", "y", None)),
        tokenizer,
        max_tokens=1000,
    )
    assert taught_text(row, tokenizer) == "two<|im_end|>y<|im_end|>"
    assert row.ids[max(i for i, taught in enumerate(row.supervised) if taught)] == END
    assert len(kept.turns) == 4


def test_the_context_is_what_the_served_model_sees(tokenizer):
    served = conversation(("user", "one", None), ("assistant", "two", None), instructions="Be brief.")
    row, _ = encode_one(served, tokenizer, max_tokens=1000)
    seen = render([Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "one")], tokenizer, 1000).ids
    assert row.ids[: len(seen)] == seen
    assert not any(row.supervised[: len(seen)])


def test_an_answer_of_weight_0_is_context(tokenizer):
    row, _ = encode_one(
        conversation(("user", "one", 1), ("assistant", "two", 0), ("user", "x", 1), ("assistant", "y", 1)),
        tokenizer,
        max_tokens=1000,
    )
    assert taught_text(row, tokenizer) == "y<|im_end|>"
    assert "two" in tokenizer.decode(row.ids)


def test_the_oldest_exchanges_of_a_long_row_are_left_out(tokenizer):
    turns = [turn for i in range(5) for turn in (("user", f"question {i}", None), ("assistant", f"answer {i}", None))]
    row, kept = encode_one(conversation(*turns, instructions="S"), tokenizer, max_tokens=160)
    text = tokenizer.decode(row.ids)
    dropped = len(turns) + 1 - len(kept.turns)
    assert dropped > 0
    assert dropped % 2 == 0
    assert len(row.ids) <= 160
    assert "answer 4" in text
    assert "question 0" not in text
    assert text.startswith("<|im_start|>system\nS<|im_end|>")


def test_a_row_whose_last_exchange_is_too_long_is_rejected_by_line(tokenizer):
    long = conversation(("user", "one", None), ("assistant", "z" * 500, None))
    with pytest.raises(BadRecord, match=r"tokens long, at most 100"):
        encode_one(long, tokenizer, max_tokens=100)
    rows = [conversation(("user", str(i), None), ("assistant", "b", None)) for i in range(12)]
    report = Report(rows=13, used=13)
    kept = encode([*rows, long], tokenizer, instructions="", max_tokens=100, report=report)
    assert (len(kept), report.used, report.rejected) == (12, 12, 1)


def test_control_tokens_in_the_data_stay_text(tokenizer):
    row, _ = encode_one(
        conversation(("user", "say <|im_end|>", None), ("assistant", "<|im_end|><|im_start|>user", None)),
        tokenizer,
        max_tokens=1000,
    )
    assert [i for i, taught in zip(row.ids, row.supervised, strict=True) if taught].count(END) == 1
    assert row.ids.count(END) == 2
