"""Six roles x every command: no effect without a grant, and whatever needs one is audited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from core.adapters import folders, registry
from core.channels import operators
from core.commands.parser import find
from core.commands.table import COMMANDS, Form
from core.i18n.messages import languages, say
from core.jobs import datasets, event_log, jobs
from core.jobs.protocol import Checked
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.types import Grant
from core.usage import prices
from tests.support.database import write_now
from tests.support.roles import DATASET, ROLES, Roles, ask, open_roles

GRANTS = dict.fromkeys(ROLES, Grant.ANYONE) | {"operator": Grant.OPERATOR, "owner": Grant.OWNER}
FORMS = [(command.name, form) for command in COMMANDS for form in command.forms]


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        write_now(made.database, lambda tx: _train(tx, made))
        yield made


def _train(tx: Tx, it: Roles) -> None:
    """A data set, and a version that was made of it."""
    datasets.keep_dataset(tx, DATASET, "faq.jsonl", source="file", size_bytes=1, brought_by=it.hash("owner"))
    judged = json.dumps({"judged": {"verdict": "passed", "champion": "base", "worst": [[7, 1.0, 2.0]]}})
    for version in (4, 5):
        candidate = folders.Candidate(f"{version:064x}", Path(), "base", DATASET, judged)
        registry.publish(tx, candidate, "acme", version)


def _ask(tx: Tx) -> None:
    """The job's question, as core.jobs.checks leaves it."""
    event_log.add_event(tx, 1, Checked(12, 12, 0, 500, 8, 2, 2, personal=("phone numbers: 1",)))
    jobs.await_confirmation(tx, 1)
    tx.run("UPDATE delivery SET state = 'done' WHERE job_id = 1")


def _answer(tx: Tx, it: Roles, role: str) -> None:
    """A reply that this person was given in the conversation, with the number of the example."""
    caller = it.caller(tx, role)
    tx.insert(
        "generation",
        id="5f3a9c01" + "0" * 24,  # as the example of /consent reply names it
        inbox_id=ask(tx, caller, "how long?", 2),
        channel_id=caller.channel.id,
        user_hash=caller.user,
        price_id=prices.price_now(tx, caller.channel.id).id,
        seed=1,
        state="delivered",
        started_ms=tx.now_ms,
    )


def _give_up(tx: Tx, it: Roles) -> int:
    """A message that was given up; the number of its row."""
    row = ask(tx, it.caller(tx, "user"), "poison", 3)
    tx.run("UPDATE inbox SET state = 'dead', payload = ? WHERE id = ?", [tx.cipher.seal('{"text": "poison"}'), row])
    return row


def line(it: Roles, role: str, name: str, form: Form) -> str:
    """The form's own example, about things that are there."""
    if name == "correct" or (name, form.word) == ("consent", "reply"):
        write_now(it.database, lambda tx: _answer(tx, it, role))
    if (name, form.word) == ("channel", "create"):
        return "/channel create brook The Brook"
    if (name, form.word) == ("operator", "remove"):
        return f"/operator remove {it.operator_id('operator')}"
    if name == "finetune" and form.parameters and form.parameters[0].name == "dataset":
        return f"/finetune {form.word} {DATASET}"  # as prepare_data stores it
    if (name, form.word) in (("finetune", "start"), ("finetune", "preview"), ("finetune", "redact")):
        it.says("owner", f"/finetune {DATASET}")
        write_now(it.database, _ask)
        return f"/finetune {form.word}"
    if (name, form.word) == ("finetune", "resume"):
        it.says("owner", f"/finetune {DATASET} yes")
        write_now(it.database, lambda tx: jobs.start(tx, 1))
        it.says("owner", "/finetune cancel")
        return "/finetune resume"
    if (name, form.word) == ("adapter", "choose"):
        it.says("owner", "/adapter compare acme@4 How long?")
        return "/adapter choose 1 a"
    if (name, form.word) in (("finetune", "status"), ("finetune", "cancel"), ("adapter", "rollback")):
        it.says("owner", f"/finetune {DATASET}" if name == "finetune" else "/adapter promote 4")
        return f"/{name} {form.word}"
    if (name, form.word) == ("inbox", "retry"):
        return f"/inbox retry {write_now(it.database, lambda tx: _give_up(tx, it))}"
    if name == "claim":
        return f"/claim {write_now(it.database, lambda tx: operators.invite(tx, None, 'Kim', 'test'))}"
    return form.example


@pytest.mark.parametrize("role", ROLES)
def test_no_effect_without_a_grant_and_all_is_audited(tmp_path: Path, role: str) -> None:
    (tmp_path / "first").mkdir()
    with open_roles(tmp_path / "first") as made:
        write_now(made.database, lambda tx: _train(tx, made))
    for number, (name, form) in enumerate(FORMS):
        folder = tmp_path / str(number)  # a database for each form: an earlier one would change what it meets
        shutil.copytree(tmp_path / "first", folder)
        with Database(folder / "a.db", Cipher(b"k" * 32)) as database:
            _check(Roles(database), role, name, form)


def _check(it: Roles, role: str, name: str, form: Form) -> None:
    text = line(it, role, name, form)
    allowed = GRANTS[role] >= form.who
    before, audited = it.rows(), len(it.audit())
    said = it.says(role, text)
    rows = it.audit()[audited:]
    if form.who is not Grant.ANYONE:
        assert len(rows) == 1
        assert rows[0]["actor"] == it.hash(role)
        assert rows[0]["action"] == f"{name} {form.word}".strip()
        assert rows[0]["allowed"] == allowed
    assert (said == say("en", "error.not_allowed")) is not allowed
    if not allowed:
        assert it.rows() == before


def test_a_refusal_does_not_tell_what_exists(it: Roles) -> None:
    for here, nowhere in (
        ("/channel show acme", "/channel show nothing"),
        ("/channel set acme title=x", "/channel set nothing title=x"),
        ("/channel archive terminal", "/channel archive nothing"),
        ("/channel create acme", "/channel create nothing"),
        ("/operator invite terminal", "/operator invite nothing"),
        ("/operator remove 1", "/operator remove 999"),
    ):
        for role in ("stranger", "other_operator", "removed"):
            assert it.says(role, here) == it.says(role, nowhere) == say("en", "error.not_allowed")


def test_an_operator_is_one_of_the_named_channel_wherever_it_is_said(it: Roles) -> None:
    assert it.says("operator", "/channel set acme title=There", place="delta").startswith("Changed")
    assert it.says("operator", "/channel set title=Here", place="delta") == say("en", "error.not_allowed")
    assert it.says("other_operator", "/channel show delta", place="acme").startswith("**Delta**")


def test_money_places_and_adapter_names_are_the_owners_to_set(it: Roles) -> None:
    for n, setting in enumerate(("adapter=delta", "price_in=1", "price_out=1", "share=50", "bind=fake:bot")):
        before = it.rows()
        assert it.says("operator", f"/channel set acme title=New{n} {setting}") == say("en", "error.not_allowed")
        assert it.rows() == before
        assert it.audit()[-1]["allowed"] == 0
        assert it.says("owner", f"/channel set acme title=New{n} {setting}").startswith("Changed")


def test_nobody_invites_to_more_than_they_operate(it: Roles) -> None:
    for what in ("/operator invite all", "/operator invite delta Kim"):
        assert it.says("operator", what) == say("en", "error.not_allowed")
        assert it.rows()["invite"] == []


def test_an_operator_sees_and_removes_those_of_the_own_channel_alone(it: Roles) -> None:
    assert "other_operator" not in it.says("operator", "/operator list")
    for who in ("other_operator", "owner"):
        assert it.says("operator", f"/operator remove {it.operator_id(who)}") == say("en", "error.not_allowed")
    assert "other_operator" in it.says("owner", "/operator list")


def test_help_shows_what_one_may_do(it: Roles) -> None:
    for role, language in product(("stranger", "other_operator", "operator", "owner"), languages()):
        said = it.says(role, "/help", language=language)
        for command in COMMANDS:
            assert (f"`/{command.name}`" in said) is (command.who <= GRANTS[role])
        assert say(language, "help.who_operator") in it.says("stranger", "/help adapter", language=language)
        assert find("adapter").help(language) in it.says("operator", "/help", language=language)
