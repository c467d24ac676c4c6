"""/new, /retry, /stop and /help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import BadCommand, BadInput
from core.i18n.messages import say
from core.types import Body, Effect, ForgetMemory, Outcome, StopReply
from tests.support.database import read_now, write_now
from tests.support.roles import Roles, open_roles


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        yield made


def test_new_begins_the_conversation_anew_and_no_other(it: Roles) -> None:
    outcome = it.run("user", "/new")
    assert outcome.body.text == say("en", "users.new")
    conversation = read_now(it.database, lambda tx: tx.value("SELECT id FROM conversation WHERE place = 'acme'"))
    assert outcome.after == (ForgetMemory("acme", str(conversation)),)
    assert {turn["conversation_id"] for turn in it.rows()["turn"]} == {2} != {conversation}


def test_retry_asks_for_another_answer_where_there_was_a_question(it: Roles) -> None:
    assert it.run("user", "/retry").after == (Effect.ANSWER_AGAIN,)
    it.run("user", "/new")
    with pytest.raises(BadInput) as raised:
        it.run("user", "/retry")
    assert raised.value.key == "service.nothing_to_retry"


def test_stop_says_whether_there_was_anything_to_stop(it: Roles) -> None:
    outcome = it.run("user", "/stop")
    assert outcome == Outcome(outcome.body, (StopReply(it.hash("user")),))
    assert outcome.body.text == say("en", "users.nothing_to_stop")
    write_now(it.database, lambda tx: tx.run("UPDATE inbox SET state = 'running' WHERE place = 'acme'"))
    assert it.says("user", "/stop") == say("en", "users.stop")
    assert it.says("user", "/stop", place="delta") == say("en", "users.nothing_to_stop")
    assert it.says("stranger", "/stop") == say("en", "users.not_yours_to_stop")
    assert it.run("operator", "/stop") == Outcome(Body(say("en", "users.stop")), (StopReply(""),))


def test_help_of_an_unknown_command_names_the_nearest(it: Roles) -> None:
    with pytest.raises(BadCommand) as raised:
        it.run("user", "/help fintune")
    assert raised.value.fields["nearest"] == "/finetune"
