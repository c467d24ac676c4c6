"""What /channel and /operator do; all of it in the audit log with before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.adapters import folders, registry
from core.channels import audit, bindings, directory
from core.chat import dispatch
from core.commands import registry as handlers
from core.commands.parser import parse
from core.errors import BadInput, NotAllowed, UnknownThing, UserError
from core.i18n.messages import languages, say
from core.storage.database import Tx
from core.types import Body, Caller, ForgetMemory, Outcome
from tests.support.database import read_now, write_now
from tests.support.roles import Roles, open_roles


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        yield made


def refusal(it: Roles, text: str, who: str = "owner", language: str = "en") -> str:
    """What the service would say; nothing is changed."""
    before = it.rows(), it.audit()
    with pytest.raises(UserError) as raised:
        it.run(who, text)
    assert (it.rows(), it.audit()) == before
    return say(language, raised.value.key, **raised.value.fields)


def last(it: Roles) -> tuple[object, object, object, object]:
    row = it.audit()[-1]
    before, after = (json.loads(str(row[name])) if row[name] else None for name in ("before", "after"))
    return row["action"], row["target"], before, after


def test_a_channel_is_made_bound_set_shown_and_archived(it: Roles) -> None:
    said = it.says("owner", "/channel create brook The Brook")
    assert "/channel set brook bind=" in said
    assert last(it)[:3] == ("channel create", "brook", None)
    it.run("owner", "/channel set brook bind=fake:bot/b")
    assert last(it) == ("channel set", "brook", {"bind fake:bot/b": ""}, {"bind fake:bot/b": "brook"})
    assert "**The Brook** (`brook`)" in it.says("user", "/whoami", place="b").replace("channel: ", "")
    said = it.says("owner", '/channel set brook title="A Brook" per_minute=7 instructions="Be brief.\nBe kind."')
    assert "per_minute: 6 → 7" in said
    assert last(it)[2:] == (
        {"title": "The Brook", "per_minute": 6, "instructions": ""},
        {"title": "A Brook", "per_minute": 7, "instructions": "Be brief.\nBe kind."},
    )
    shown = it.says("owner", "/channel show brook")
    for part in ("A Brook", "7 a minute", "60 an hour", "2000 tokens in", "512 out", "fake:bot/b", "Be kind.", "base"):
        assert part in shown
    outcome = it.run("owner", "/channel archive brook")
    assert outcome.after == (ForgetMemory("brook"),)
    assert last(it) == ("channel archive", "brook", {"archived": False}, {"archived": True})
    assert read_now(it.database, lambda tx: bindings.channel_for(tx, "fake", "bot", "b")) is None
    assert "archived" in it.says("owner", "/channel list")
    assert "archived" in refusal(it, "/channel set brook title=x")


def test_new_instructions_warn_where_a_version_answers_that_was_trained_under_others(it: Roles) -> None:
    def work(tx: Tx) -> None:
        manifest = json.dumps({"instructions_sha256": hashlib.sha256(b"Be brief.").hexdigest()})
        registry.publish(tx, folders.Candidate("v", Path(), "base", "", manifest), "acme", 1)
        registry.promote(tx, "acme", "v", "me", "")

    write_now(it.database, work)
    warning = say("en", "operators.trained_otherwise", label="acme@1")
    assert it.says("owner", '/channel set acme instructions="Be kind."').endswith(warning)
    assert warning not in it.says("owner", "/channel set acme title=x")
    assert warning not in it.says("owner", '/channel set acme instructions="Be brief."')


def test_a_price_is_a_new_row_and_the_old_ones_stay(it: Roles) -> None:
    it.run("owner", "/channel set acme price_in=150 price_out=600 share=30%")
    it.run("owner", "/channel set acme share=33.25")
    it.run("owner", "/channel set acme share=0.5%")
    rows = [row for row in it.rows()["price"] if row["channel_id"] == 2]
    assert [(row["in_nano"], row["out_nano"], row["share_bps"]) for row in rows] == [
        (0, 0, 0),
        (150, 600, 3000),
        (150, 600, 3325),
        (150, 600, 50),
    ]
    assert last(it)[2:] == ({"share": 33.25}, {"share": 0.5})


def test_what_is_so_already_is_no_change(it: Roles) -> None:
    before = it.rows()
    assert it.says("operator", "/channel set acme title=Acme per_minute=6") == say(
        "en", "operators.set_nothing", name="acme"
    )
    assert it.rows() == before
    assert it.audit()[-1]["allowed"] == 1


@pytest.mark.parametrize("language", languages())
@pytest.mark.parametrize(
    "setting",
    [
        "title=''",
        f"title={'x' * 81}",
        f"instructions={'x' * 8001}",
        "language=klingon",
        "per_minute=-1",
        "per_hour=many",
        "per_hour=1.5",
        "tokens_in=1e9",
        "tokens_in=99999999999",
        "tokens_in=٣",
        "tokens_out=0",
        "temperature=2.1",
        "temperature=nan",
        "top_p=0",
        "top_p=1.1",
        "share=101",
        "share=-1",
        "share=0.5",
        "price_in=0.5",
        "price_out=x",
        "adapter=nothing",
        "adapter=",
        "bind=fake",
        "bind=fake:",
        "bind=:bot",
        "bind='fake:a b'",
    ],
)
def test_a_wrong_value_changes_nothing_and_is_told_with_what_it_must_be(it: Roles, setting: str, language: str) -> None:
    said = refusal(it, f"/channel set acme title=New {setting}", language=language)
    assert setting.partition("=")[0] in said
    assert "…" not in said or len(setting) > 80
    assert "operators." not in said


@pytest.mark.parametrize("name", ["base", "all", "Acme", "a/", "-x", "x" * 64, "好"])
def test_a_channels_name_is_a_plain_word(it: Roles, name: str) -> None:
    assert name[:20] in refusal(it, f"/channel create {name}")


def test_a_name_is_taken_once(it: Roles) -> None:
    assert "acme" in refusal(it, "/channel create acme")
    it.run("owner", "/channel archive acme", place="delta")
    assert "acme" in refusal_at(it, "/channel create acme", "delta")


def refusal_at(it: Roles, text: str, place: str) -> str:
    with pytest.raises(UserError) as raised:
        it.run("owner", text, place=place)
    return say("en", raised.value.key, **raised.value.fields)


def test_an_owner_who_mistypes_is_told_what_there_is(it: Roles) -> None:
    with pytest.raises(UnknownThing):
        it.run("owner", "/channel show acne")
    assert "acme, delta, terminal" in refusal(it, "/channel show acne")
    assert "999" in refusal(it, "/operator remove 999")
    assert "Kim" in refusal(it, "/operator invite Kim")


def test_the_terminal_stays(it: Roles) -> None:
    with pytest.raises(BadInput):
        it.run("owner", "/channel archive terminal")


def test_the_language_of_a_channel(it: Roles) -> None:
    it.run("operator", "/channel set acme language=zh-Hans")
    assert read_now(it.database, lambda tx: it.caller(tx, "user").channel.language) == "zh"
    assert "中文" in it.says("operator", "/channel show")
    it.run("operator", "/channel set acme language=auto")
    assert read_now(it.database, lambda tx: it.caller(tx, "user").channel.language) == ""


def test_a_channel_may_follow_an_adapter_name_of_its_own_partner_alone(it: Roles) -> None:
    it.run("owner", "/channel set delta adapter=acme")
    assert read_now(it.database, lambda tx: it.caller(tx, "user", "delta").channel.adapter) == "acme"

    def stranger(tx: Tx) -> None:
        tx.insert("partner", name="rival", title="Rival", created_ms=1)
        directory.create_channel(tx, "rival", partner="rival")

    write_now(it.database, stranger)
    assert "rival" in refusal(it, "/channel set delta adapter=rival")


def test_a_place_that_moves_is_audited_with_whose_it_was(it: Roles) -> None:
    it.run("owner", "/channel set delta bind=fake:bot/acme")
    assert last(it) == ("channel set", "delta", {"bind fake:bot/acme": "acme"}, {"bind fake:bot/acme": "delta"})
    it.run("owner", "/channel set delta bind=fake:bot", place="delta")
    assert "fake:bot, fake:bot/acme, fake:bot/delta" in it.says("owner", "/channel show delta")


def test_a_code_is_shown_once_and_in_no_row(it: Roles) -> None:
    said = it.says("operator", "/operator invite")
    code = next(line for line in said.splitlines() if "/claim" in line).strip("`").removeprefix("/claim ")
    assert len(code.replace("-", "")) >= 8
    assert code not in str(it.rows())
    assert code.replace("-", "") not in str(it.rows())
    assert last(it) == ("operator invite", "acme", None, {"label": ""})


def test_a_removed_operator_is_one_no_more_and_the_open_invitations_end(it: Roles) -> None:
    said = it.says("operator", "/operator invite acme Kim")
    code = next(line for line in said.splitlines() if "/claim" in line).strip("`")
    it.run("owner", f"/operator remove #{it.operator_id('operator')}")
    assert last(it) == ("operator remove", "acme", {"operator": it.hash("operator"), "label": "operator"}, None)
    assert it.says("operator", "/channel show") == say("en", "error.not_allowed")
    assert it.says("stranger", code) == say("en", "users.claim_bad")


def test_the_last_owner_stays(it: Roles) -> None:
    it.run("owner", "/operator remove 1")
    assert "Invite another" in refusal(it, f"/operator remove {it.operator_id('owner')}")


def test_a_handler_that_refuses_late_undoes_what_it_did(it: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(tx: Tx, caller: Caller, call: object) -> Outcome:
        tx.insert("setting", key="half", value="done")
        audit.record(tx, caller, "adapter promote", "acme@4")
        raise NotAllowed

    before, audited = it.rows(), len(it.audit())
    call = parse("/adapter promote acme@4")
    monkeypatch.setitem(handlers._registered, call.key, handlers.Registered(late))
    outcome = write_now(it.database, lambda tx: dispatch.run(tx, it.caller(tx, "operator"), call))
    assert outcome.body == Body(say("en", "error.not_allowed"))
    assert it.rows() == before
    (row,) = it.audit()[audited:]
    assert (row["allowed"], row["target"]) == (0, "acme@4")
