"""/whoami, /language and /claim."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.channels import people
from core.chat import dispatch
from core.commands.parser import parse
from core.errors import BadInput
from core.i18n.messages import language_name, languages, say
from core.types import Outcome
from tests.support.database import read_now
from tests.support.roles import Roles, open_roles


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        yield made


def test_whoami_names_channel_and_rights(it: Roles) -> None:
    for role, rights in (("user", "/help"), ("operator", "of this channel"), ("owner", "of all channels")):
        said = it.says(role, "/whoami")
        assert "**Acme** (`acme`)" in said
        assert rights in said
        assert it.hash(role)[:12] in said
        assert role not in said.replace("operator of", "")


def test_a_language_is_chosen_by_code_or_name_and_given_back(it: Roles) -> None:
    for typed, chosen in (("zh", "zh"), ("English", "en"), ("中文", "zh"), ("auto", "")):
        said = it.says("user", f"/language {typed}")
        assert read_now(it.database, lambda tx: people.language_of(tx, it.hash("user"))) == chosen
        assert said == (
            say(chosen, "users.language_set", name=language_name(chosen))
            if chosen
            else say("en", "users.language_auto")
        )
    with pytest.raises(BadInput) as raised:
        it.run("user", "/language klingon")
    assert str(raised.value.fields["codes"]) == ", ".join([*languages(), "auto"])
    assert "English" in it.says("user", "/language")
    assert "中文" in it.says("user", "/language", language="zh")


def code_of(said: str) -> str:
    return next(line for line in said.splitlines() if "/claim" in line).strip("`").removeprefix("/claim ")


def test_an_invitation_makes_one_operator_and_is_used_up(it: Roles) -> None:
    code = code_of(it.says("owner", "/operator invite acme Kim"))
    said = it.says("stranger", f"/claim {code.lower().replace('-', ' ').split()[0]}-{code[5:]}")
    assert said == say("en", "users.claim_channel", title="Acme")
    assert "Kim" in it.says("stranger", "/operator list")
    assert it.audit()[-2]["action"] == "claim"
    assert it.says("user", f"/claim {code}") == say("en", "users.claim_bad")
    assert it.audit()[-1]["allowed"] == 0
    assert it.says("stranger", "/channel show delta") == say("en", "error.not_allowed")


def test_a_wrong_code_gives_nothing(it: Roles) -> None:
    code = code_of(it.says("owner", "/operator invite all"))
    wrong = code[:-1] + ("2" if code[-1] != "2" else "3")
    before = it.rows()
    assert it.says("stranger", f"/claim {wrong}") == say("en", "users.claim_bad")
    assert it.rows() == before
    assert code not in str(it.rows()) + str(it.audit())


async def test_two_who_claim_one_code_at_once_one_wins(it: Roles) -> None:
    code = code_of(it.says("owner", "/operator invite all Kim"))
    call = parse(f"/claim {code}")

    def claim(who: str) -> asyncio.Future[Outcome]:
        work = it.database.write(lambda tx: dispatch.run(tx, it.caller(tx, who), call))
        return asyncio.ensure_future(work)

    results = await asyncio.gather(*(claim(f"person {n}") for n in range(20)))
    assert [result.body.text == say("en", "users.claim_bad") for result in results].count(False) == 1
    assert [row["label"] for row in it.rows()["operator"]].count("Kim") == 1
