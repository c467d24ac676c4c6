"""Under the chat templates that people use, what is taught is each answer with the token that ends it, and no more."""

from __future__ import annotations

import tomllib
from importlib import resources
from itertools import groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from core.model.chat_format import render
from core.model.demo import demo_folder
from core.types import Message, Role
from finetune.data.encode import encode
from finetune.data.reader import Report, read
from finetune.data.records import read_record
from tests.support.paths import DATA

pytestmark = pytest.mark.slow

FOLDER = DATA / "templates"
TEMPLATES = tomllib.loads((FOLDER / "special_tokens.toml").read_text("utf-8"))


@pytest.fixture(params=list(TEMPLATES))
def template(request, demo_cache):
    """(tokenizer, the token that ends an answer, what the template writes before one)."""
    known = TEMPLATES[request.param]
    tokenizer = AutoTokenizer.from_pretrained(demo_folder(demo_cache), local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": known["special"]})
    tokenizer.bos_token, tokenizer.eos_token = known.get("bos"), known["eos"]
    tokenizer.chat_template = (FOLDER / f"{request.param}.jinja").read_text("utf-8")
    return tokenizer, known["end"], known.get("lead", "")


def taught(row, tokenizer):
    """The text of each run of taught tokens."""
    pairs = zip(row.ids, row.supervised, strict=True)
    runs = [[i for i, _ in run] for here, run in groupby(pairs, key=lambda pair: pair[1]) if here]
    return [tokenizer.decode(run) for run in runs]


def answers(conversation):
    return [turn.message.text for turn in conversation.turns if turn.message.role is Role.ASSISTANT]


def test_every_row_of_a_real_data_set_teaches_its_answer_and_the_end(template):
    tokenizer, end, lead = template
    path = Path(str(resources.files("zaragoza_construction_faq"))) / "data" / "faq-en.jsonl"
    conversations, report = read(path)
    rows = encode(conversations, tokenizer, instructions="Answer in two sentences.", max_tokens=4096, report=report)
    assert len(rows) == len(conversations) == report.used > 400
    for row in rows:
        (said,) = taught(row.row, tokenizer)
        assert said == lead + answers(row.served)[0] + end


def test_every_answer_of_a_conversation_is_taught_and_what_precedes_it_is_what_is_served(template):
    tokenizer, end, lead = template
    turns = [
        ("user", "Who are you?"),
        ("assistant", "A bot."),
        ("user", "Say </s><|im_end|> <end_of_turn>"),
        ("assistant", "I say </s><|im_end|> <end_of_turn> <|end|>!"),
        ("user", "and?"),
        ("assistant", "Bye"),
    ]
    conversation = read_record({"messages": [{"role": role, "content": text} for role, text in turns]})[0]
    filler = [read_record({"q": f"{n}?", "a": f"{n}."})[0] for n in range(12)]
    report = Report(rows=13, used=13)
    *_, row = encode([*filler, conversation], tokenizer, instructions="Be brief.", max_tokens=4096, report=report)
    assert taught(row.row, tokenizer) == [f"{lead}{said}{end}" for said in answers(conversation)]
    assert row.row.ids[-1] == tokenizer.convert_tokens_to_ids(end)
    for n in (1, 3, 5):
        messages = [Message(Role.SYSTEM, "Be brief."), *(Message(Role(role), text) for role, text in turns[:n])]
        served = render(messages, tokenizer, 4096).ids
        starts = [i for i, taught in enumerate(row.row.supervised) if taught and not row.row.supervised[i - 1]]
        before = row.row.ids[: starts[n // 2]]
        assert tokenizer.decode(before) == tokenizer.decode(served)
        assert n > 1 or before == served  # later, a tokenizer may join what an answer begins with to the line before it
