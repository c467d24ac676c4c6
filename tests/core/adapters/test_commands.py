"""/adapter: who may move what, what it says, and that a rollback brings back what answered before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.adapters import folders, registry
from core.channels import adapter_names
from core.errors import BadInput, UnknownThing
from core.i18n.messages import languages, say
from core.jobs import datasets, jobs
from core.storage.database import Tx
from tests.support.database import read_now, write_now
from tests.support.roles import Roles, open_roles

MANIFEST = {
    "base_model": "Small", "rows": {"train": 80, "validation": 10, "test": 10}, "dropout": 0.1, "seconds": 61,
    "hyper": {"rank": 8, "alpha": 16, "learning_rate": 0.001, "epochs": 2, "clip_value": 1.0, "clip_norm": 1.0},
    "losses": {"test_base": 3.9, "test_candidate": 2.8},
}  # fmt: skip


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        write_now(made.database, lambda tx: _publish(tx, made))
        yield made


def _publish(tx: Tx, it: Roles) -> None:
    datasets.keep_dataset(tx, "d" * 64, "faq.jsonl", source="file", size_bytes=1, brought_by="x")
    registry.keep_base(tx, "loaded")
    for n, base in enumerate(("loaded", "loaded", "another"), start=1):
        candidate = folders.Candidate(f"{n:064x}", Path(), base, "d" * 64, json.dumps(MANIFEST))
        registry.publish(tx, candidate, "acme", n)
        job = jobs.create(tx, it.caller(tx, "operator"), "d" * 64, "faq.jsonl")
        jobs.end(tx, job.id, "published", result=candidate.sha256)


def judge(it: Roles, number: int, verdict: str, against: str) -> None:
    manifest = json.dumps({**MANIFEST, "judged": {"verdict": verdict, "champion": against}})
    write_now(it.database, lambda tx: tx.run("UPDATE adapter SET manifest = ? WHERE version = ?", [manifest, number]))


def champion(it: Roles) -> str:
    return read_now(it.database, lambda tx: adapter_names.champion(tx, "acme")[1])


def test_promote_moves_the_champion_names_the_channels_and_is_audited(it: Roles) -> None:
    said = it.says("operator", "/adapter promote @1 better tone")
    assert champion(it) == "acme@1"
    assert "**acme@1** answers in **Acme** (fake:bot/acme)" in said
    assert "returns to base" in said
    row = it.audit()[-1]
    assert (row["action"], row["target"], row["before"]) == ("adapter promote", "acme", '"base"')
    assert json.loads(str(row["after"])) == {"version": "acme@1", "reason": "better tone"}


def test_rollback_goes_down_to_base_and_then_says_so(it: Roles) -> None:
    it.says("operator", "/adapter promote 1")
    it.says("operator", "/adapter promote 2")
    assert "**acme@1** answers" in it.says("operator", "/adapter rollback")
    assert "**base** answers" in it.says("operator", "/adapter rollback")
    assert champion(it) == "base"
    assert it.says("operator", "/adapter rollback") == say("en", "adapter.nothing_to_undo", label="base")


def test_rollback_skips_a_version_for_another_base_model(it: Roles) -> None:
    def put(tx: Tx) -> None:
        for n in (3, 1):  # acme@3 answered while another model was loaded
            registry.promote(tx, "acme", f"{n:064x}", "me", "")

    write_now(it.database, put)
    assert champion(it) == "acme@1"
    assert "**base** answers" in it.says("operator", "/adapter rollback")


@pytest.mark.parametrize(("typed", "back"), [("1", "base"), ("base", "")])
def test_promote_names_what_a_rollback_will_bring_back(it: Roles, typed: str, back: str) -> None:
    write_now(it.database, lambda tx: registry.promote(tx, "acme", f"{3:064x}", "me", ""))  # of another base model
    said = it.says("operator", f"/adapter promote {typed}")
    assert "acme@3" not in said
    assert ("rollback" in said) == bool(back)
    if back:
        assert f"returns to {back}" in said
    told = it.says("operator", "/adapter rollback")
    assert (f"**{back}** answers" in told) if back else told == say("en", "adapter.nothing_to_undo", label="base")


def test_base_is_a_version_like_any_other(it: Roles) -> None:
    it.says("operator", "/adapter promote 1")
    it.says("operator", "/adapter promote base")
    assert champion(it) == "base"
    it.says("operator", "/adapter rollback")
    assert champion(it) == "acme@1"


def test_what_answers_already_is_not_promoted_again(it: Roles) -> None:
    it.says("operator", "/adapter promote 1")
    assert it.says("operator", "/adapter promote 1") == say("en", "adapter.already", label="acme@1")
    assert read_now(it.database, lambda tx: tx.value("SELECT count(*) FROM promotion")) == 1


def test_a_version_that_is_not_here_is_named_with_those_that_are(it: Roles) -> None:
    for typed in ("9", "acme@9", "delta@1", "acme", "acme@", "acme@x", "1e0"):
        with pytest.raises(UnknownThing) as refused:
            it.says("operator", f"/adapter promote {typed}")
        assert refused.value.fields["known"] == "acme@3, acme@2, acme@1, base", typed


def test_versions_of_another_channel_are_as_unknown_as_none(it: Roles) -> None:
    with pytest.raises(UnknownThing) as refused:
        it.says("other_operator", "/adapter show acme@1", place="delta")
    assert "acme" not in str(refused.value.fields["known"])


def test_a_version_for_another_base_model_is_not_put_into_service(it: Roles) -> None:
    with pytest.raises(BadInput) as refused:
        it.says("operator", "/adapter promote 3")
    assert refused.value.key == "adapter.is_of_another_base"
    assert champion(it) == "base"


def test_a_withdrawn_version_is_not_put_into_service(it: Roles) -> None:
    write_now(it.database, lambda tx: registry.unpublish(tx, f"{1:064x}", "erased"))
    with pytest.raises(BadInput) as refused:
        it.says("operator", "/adapter promote 1")
    assert refused.value.key == "adapter.is_unpublished"
    assert "withdrawn" in it.says("operator", "/adapter list")


@pytest.mark.parametrize("command", ["/adapter promote 1", "/adapter rollback"])
def test_a_name_that_two_channels_follow_is_moved_by_who_operates_both(it: Roles, command: str) -> None:
    it.says("owner", "/adapter promote 2")
    write_now(it.database, lambda tx: tx.run("UPDATE channel SET adapter = 'acme' WHERE name = 'delta'"))
    assert it.says("operator", command) == say("en", "error.not_allowed")
    assert champion(it) == "acme@2"
    said = it.says("owner", command)
    assert "**Acme** (fake:bot/acme), **Delta** (fake:bot/delta)" in said


def test_an_archived_follower_needs_nobodys_leave(it: Roles) -> None:
    write_now(it.database, lambda tx: tx.run("UPDATE channel SET adapter = 'acme' WHERE name = 'delta'"))
    it.says("owner", "/channel archive delta")
    assert "answers in **Acme**" in it.says("operator", "/adapter promote 1")


@pytest.mark.parametrize("language", languages())
def test_list_and_show_say_what_a_version_is(it: Roles, language: str) -> None:
    it.says("operator", "/adapter promote 2")
    listed = it.says("operator", "/adapter list", language=language)
    assert listed.index("acme@3") < listed.index("acme@2") < listed.index("acme@1") < listed.index("`base`")
    assert say(language, "adapter.in_service") in next(line for line in listed.splitlines() if "acme@2" in line)
    shown = it.says("operator", "/adapter show 2", language=language)
    for part in ("faq.jsonl", "3.90 → 2.80", "80", "0.001", "Small", f"{2:064x}"[:12]):
        assert part in shown
    assert "…" not in shown + listed
    assert say(language, "training.data_you") in shown.splitlines()[-1]
    assert it.run("operator", "/adapter show 1", language=language).body.buttons[0].value == "/adapter promote acme@1"


def test_show_says_how_many_epochs_were_done(it: Roles) -> None:
    for version, (language, done, told) in enumerate(
        (
            ("en", 5.9, " 5.9 of 8 rounds,"),
            ("zh", 6.0, "，计划 8 轮中的 6 轮，"),
            ("en", 8.0, " 8 rounds,"),
            ("zh", 8.0, "，8 轮，"),
        ),
        start=4,
    ):
        manifest = json.dumps({"hyper": {"epochs": 8}, "epochs_done": done})
        candidate = folders.Candidate(str(version) * 64, Path(), "loaded", "", manifest)
        write_now(it.database, lambda tx, new=candidate, n=version: registry.publish(tx, new, "acme", n))
        assert told in it.says("operator", f"/adapter show {version}", language=language)


def test_an_imported_manifest_may_say_little(it: Roles) -> None:
    write_now(
        it.database,
        lambda tx: registry.publish(tx, folders.Candidate("9" * 64, Path(), "loaded", "", "{}"), "acme", 4),
    )
    assert "acme@4" in it.says("operator", "/adapter show 4")
    assert "acme@4" in it.says("operator", "/adapter list")


def test_what_did_not_pass_goes_into_service_only_with_a_reason_that_is_kept(it: Roles) -> None:
    for verdict in ("no_better", "style_only", "forgets", "unsound", "too_few"):
        judge(it, 2, verdict, "base")
        for blank in ("", '" "', '"\u3000"'):
            with pytest.raises(BadInput) as refused:
                it.says("operator", f"/adapter promote 2 {blank}")
            assert refused.value.key == "adapter.needs_reason"
            assert say("en", f"adapter.verdict_{verdict}") in say("en", refused.value.key, **refused.value.fields)
            assert champion(it) == "base"
    it.says("operator", "/adapter promote 2 the tone is what we want")
    assert champion(it) == "acme@2"
    assert json.loads(str(it.audit()[-1]["after"]))["reason"] == "the tone is what we want"


def test_promote_says_where_what_answered_is_not_what_it_was_measured_against(it: Roles) -> None:
    judge(it, 1, "passed", "base")
    judge(it, 2, "passed", "base")
    told = say("en", "adapter.measured_otherwise", champion="base", before="acme@1")
    assert told not in it.says("operator", "/adapter promote 1")
    assert told in it.says("operator", "/adapter promote 2")
    assert "measured" not in it.says("operator", "/adapter promote 1")  # it has answered here before
