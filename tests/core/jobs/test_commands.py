"""What /finetune answers, in both languages, and what it leaves: rows, deliveries, the audit log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest

from core.adapters import folders, registry
from core.channels import directory
from core.commands.parser import parse
from core.errors import BadInput, UnknownThing
from core.i18n.messages import Lazy, languages, say
from core.jobs import datasets, event_log, jobs, messages
from core.jobs.commands import MAX_OPEN, PreparedData
from core.jobs.messages import failure_reason
from core.jobs.protocol import (
    Answered,
    Checked,
    Done,
    Estimated,
    Evaluated,
    Failed,
    JobEvent,
    Judged,
    Planned,
    Progress,
    Verdict,
    Warned,
)
from core.storage.database import Row, Tx
from core.types import Effect, Outcome
from tests.support.database import read_now, write_now
from tests.support.roles import Roles, open_roles

SHA = "a" * 64
CHECKED = Checked(100, 90, 4, 9000, 80, 5, 5, rejected=("line 7: not JSON", "line 9: no answer"), mended=("line 2: x",))
DONE = Done(60, 125.0, 3.0, 1.0, 2.5, 1.5)


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        write_now(
            made.database,
            lambda tx: datasets.keep_dataset(tx, SHA, "faq.jsonl", source="file", size_bytes=1, brought_by="x"),
        )
        yield made


def run(
    it: Roles, text: str, who: str = "operator", place: str = "acme", language: str = "en", prepared: object = None
) -> Outcome:
    call = parse(text)
    if call.form.word == "" and prepared is None:  # as prepare_data leaves it
        prepared = PreparedData(SHA, call.arguments["dataset"], call.arguments.get("go") == "yes")
    return it.run(who, text, place, language, prepared)


def says(it: Roles, text: str, who: str = "operator", place: str = "acme", language: str = "en") -> str:
    return run(it, text, who, place, language).body.text


def job_row(it: Roles, job_id: int = 1) -> Row:
    row = read_now(it.database, lambda tx: tx.one("SELECT * FROM job WHERE id = ?", [job_id]))
    assert row is not None
    return row


def publish(it: Roles, judged: Judged) -> None:
    def work(tx: Tx) -> None:
        manifest = json.dumps({"judged": asdict(judged)})
        registry.publish(tx, folders.Candidate(SHA, Path(), "base", SHA, manifest), "acme", 1)
        jobs.end(tx, 1, "published", result=SHA)

    write_now(it.database, work)


def hear(it: Roles, *events: JobEvent, state: str = "running") -> None:
    def work(tx: Tx) -> None:
        jobs.start(tx, 1)
        for event in events:
            event_log.add_event(tx, 1, event)
        if state not in jobs.OPEN:
            jobs.end(tx, 1, state)

    write_now(it.database, work)


# --- start ---


def test_start_queues_a_job_with_its_delivery_and_wakes_the_supervisor(it: Roles) -> None:
    outcome = run(it, "/finetune faq.jsonl yes", language="zh")
    assert outcome.after == (Effect.WAKE_TRAINING,)
    for fact in ("faq.jsonl", "acme@1", "1", "Acme"):
        assert fact in outcome.body.text
    row = job_row(it)
    assert (row["state"], row["language"], row["actor"], row["dataset"]) == (
        "queued",
        "zh",
        it.hash("operator"),
        "faq.jsonl",
    )
    assert read_now(it.database, lambda tx: tx.value("SELECT state FROM delivery WHERE job_id = 1")) == "open"


def test_a_job_may_have_a_preset_of_its_own_and_an_unknown_one_is_named(it: Roles) -> None:
    with pytest.raises(BadInput) as refused:
        run(it, "/finetune faq.jsonl preset=slow")
    assert "auto, card, thorough" in say("en", refused.value.key, **refused.value.fields)
    run(it, "/finetune faq.jsonl yes preset=Thorough")
    assert job_row(it)["preset"] == "thorough"


def test_a_second_job_of_a_channel_is_refused_with_the_first_named(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    with pytest.raises(BadInput) as refused:
        run(it, "/finetune faq.jsonl yes")
    sentence = say("en", refused.value.key, **refused.value.fields)
    assert "/finetune cancel 1" in sentence
    assert read_now(it.database, lambda tx: tx.value("SELECT count(*) FROM job")) == 1


def test_a_job_that_takes_the_place_of_a_question_keeps_what_people_said(it: Roles) -> None:
    write_now(it.database, lambda tx: tx.run("UPDATE dataset SET source = 'feedback'"))
    run(it, "/finetune feedback")
    write_now(it.database, lambda tx: jobs.await_confirmation(tx, 1))
    run(it, "/finetune feedback")
    assert (job_row(it, 1)["state"], job_row(it, 1)["reason"]) == ("cancelled", jobs.REPLACED)
    assert not read_now(it.database, lambda tx: datasets.is_erased(tx, SHA))
    run(it, "/finetune cancel 2")
    assert read_now(it.database, lambda tx: datasets.is_erased(tx, SHA))


def test_a_job_of_another_channel_waits_and_says_so(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    assert says(it, "/finetune b.jsonl yes", "other_operator", "delta") == say(
        "en", "training.queued", id=2, title="Delta", name="b.jsonl", label="delta@1", before=1
    )


def test_a_younger_job_that_is_at_work_is_before_an_older_one_that_waits(it: Roles) -> None:
    run(it, "/finetune faq.jsonl")
    write_now(it.database, lambda tx: (jobs.await_confirmation(tx, 1), tx.run("UPDATE delivery SET state = 'done'")))
    run(it, "/finetune b.jsonl yes", "other_operator", "delta")
    write_now(it.database, lambda tx: jobs.start(tx, 2))
    assert says(it, "/finetune start 1") == say(
        "en", "training.queued", id=1, title="Acme", name="faq.jsonl", label="acme@1", before=1
    )


def test_too_many_open_jobs_are_refused(it: Roles) -> None:
    def fill(tx: Tx) -> None:
        for n in range(MAX_OPEN):
            channel = directory.create_channel(tx, f"c{n}")
            jobs.create(tx, replace(it.caller(tx, "owner"), channel=channel), SHA)

    write_now(it.database, fill)
    with pytest.raises(BadInput) as refused:
        run(it, "/finetune faq.jsonl yes")
    assert refused.value.key == "training.too_many"


@pytest.mark.parametrize("who", ["stranger", "user", "other_operator", "removed"])
def test_who_is_no_operator_here_is_refused_and_audited(it: Roles, who: str) -> None:
    run(it, "/finetune faq.jsonl yes")
    for n, text in enumerate(("/finetune faq.jsonl yes", "/finetune status", "/finetune list", "/finetune cancel 1")):
        assert says(it, text, who) == say("en", "error.not_allowed")
        assert [row["allowed"] for row in it.audit()[-n - 1 :]] == [0] * (n + 1)
    assert job_row(it)["state"] == "queued"


def test_start_and_cancel_are_audited_with_what_was_before_and_after(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    run(it, "/finetune cancel")
    first, second = it.audit()[-2:]
    assert (first["action"], first["target"], json.loads(str(first["after"]))["dataset"]) == (
        "finetune",
        "acme@1",
        SHA,
    )
    assert (second["action"], second["target"]) == ("finetune cancel", "acme@1")
    assert json.loads(str(second["before"]))["state"] == "queued"
    assert json.loads(str(second["after"])) == "cancelled"


# --- status, list, cancel ---


def test_a_channel_without_jobs_is_told_how_to_begin(it: Roles) -> None:
    for text in ("/finetune status", "/finetune list", "/finetune cancel"):
        assert says(it, text, language="zh") == say("zh", "training.none")


def test_a_job_of_another_channel_does_not_exist(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    keys = []
    for text in ("/finetune status 1", "/finetune cancel 1", "/finetune cancel 99"):
        with pytest.raises(UnknownThing) as refused:
            run(it, text, "other_operator", "delta")
        keys.append(refused.value.key)
    assert len(set(keys)) == 1
    assert job_row(it)["state"] == "queued"


def test_what_is_no_number_of_a_job_is_unknown(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    for typed in ("0", "-1", "one", "1.0", "9" * 40, "1;", "²"):
        with pytest.raises(UnknownThing):
            run(it, f"/finetune status {typed}")


def test_status_shows_how_far_it_is(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    assert say("en", "training.state_queued") in says(it, "/finetune status")
    hear(it, CHECKED)
    assert say("en", "training.loading", name="faq.jsonl") in says(it, "/finetune status 1")
    hear(it, Answered(0, 183), Answered(48, 183))
    assert say("en", "training.answering", name="faq.jsonl", of=183, done=48) in says(it, "/finetune status 1")
    hear(it, Answered(183, 183))
    assert say("en", "training.loading", name="faq.jsonl") in says(it, "/finetune status 1")
    hear(it, Planned(60, 51_000, 80, 24))
    assert say("en", "training.planned", name="faq.jsonl", steps=60, tokens=51_000, rows=80, rehearsed=24) in says(
        it, "/finetune status 1"
    )
    early, late = (
        Progress(1, 60, 1, 3, 3.5, 200.0, 590.0),
        Progress(15, 60, 1, 3, 2.25, 210.0, 450.0, first_loss=3.5),
    )
    hear(it, early, late, Evaluated(15, "validation", 2.4, 5))
    text = says(it, "/finetune status")
    for fact in ("▓" * 5 + "░" * 15, "25 %", "8 min", "3.50 → 2.25", "2.40", "210", "1 of 3"):
        assert fact in text


def test_what_holds_a_job_up_is_told_while_it_does(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    went_on, waits = Warned("step 9: going on from step 5"), Warned("step 10: the disk is full")
    step = Progress(10, 20, 1, 2, 1.5, 100.0, 30.0)
    hear(it, Checked(12, 10, 1, 500, 8, 1, 1), went_on, step)
    assert went_on.text not in says(it, "/finetune status")
    hear(it, waits)
    assert waits.text in says(it, "/finetune status")
    hear(it, replace(step, step=11))
    assert waits.text not in says(it, "/finetune status")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_status_of_a_published_job_is_its_report(it: Roles, language: str) -> None:
    run(it, "/finetune faq.jsonl yes")
    judged = Judged("passed", 40, 38, "acme@3", 2.5, 1.5, -1.25, -0.75, 0.25, 0.5)
    hear(it, CHECKED, Evaluated(60, "test", 1.5, 40), judged, DONE)
    publish(it, judged)
    text = says(it, "/finetune status", language="en")
    for fact in (
        "90 of 100",
        "4 ",
        "line 7: not JSON",
        "line 9: no answer",
        "2.50 (acme@3) → 1.50",
        "38 of 40",
        "3 min",
    ):
        assert fact in text
    assert "and 4 more" in text  # six were rejected, two are named
    assert "/adapter promote acme@1" in says(it, "/finetune status", language=language)


@pytest.mark.parametrize("language", languages())
def test_status_of_a_version_is_true_for_as_long_as_it_is_asked(it: Roles, language: str) -> None:
    run(it, "/finetune faq.jsonl yes")
    judged = Judged("style_only", 40, 38, "base", 2.5, 1.5, -1.25, -0.75, 0.25, 0.25, worst=((1, 1.5, 2.5),))
    hear(it, judged, DONE)
    publish(it, judged)
    verdict = say(language, "training.verdict_style_only", label="acme@1")
    hint = say(language, "training.promote_anyway_hint", label="acme@1")
    write_now(it.database, lambda tx: tx.run("DELETE FROM job_event"))  # core.privacy.retention
    said = says(it, "/finetune status 1", language=language)
    assert verdict in said
    assert said.endswith(hint)
    it.says("operator", "/adapter promote 1 the tone")
    said = says(it, "/finetune status 1", language=language)
    assert verdict in said
    assert said.endswith(say(language, "training.version_now", label="acme@1", state=Lazy("adapter.in_service")))


def test_status_of_a_failed_job_says_whose_fault_it_was(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    hear(it, Failed("yours", "not JSON", 7))
    write_now(it.database, lambda tx: jobs.end(tx, 1, "failed", "yours: line 7: not JSON"))
    assert say("en", "training.failed_yours", id=1, name="faq.jsonl", title="Acme", reason="line 7: not JSON") in says(
        it, "/finetune status"
    )


@pytest.mark.parametrize(
    ("name", "source", "fault", "key"),
    [
        ("my faq.jsonl", "file", "yours", "failed_yours"),
        ("feedback", "feedback", "yours", "failed_examples"),
        ("my faq.jsonl", "file", "settings", "failed_settings"),
        ("my faq.jsonl", "file", "ours", "failed_ours"),
    ],
)
def test_a_failure_is_told_by_whose_fault_it_is_with_a_command_that_works(
    it: Roles, name: str, source: str, fault: str, key: str
) -> None:
    run(it, f'/finetune "{name}" yes')
    write_now(it.database, lambda tx: tx.run("UPDATE dataset SET source = ?", [source]))
    write_now(it.database, lambda tx: jobs.end(tx, 1, "failed", f"{fault}: a reason"))
    fields = {"title": "Acme", "id": 1, "name": name, "typed": '"my faq.jsonl"', "reason": "a reason"}
    for language in languages():
        said = says(it, "/finetune status", language=language)
        assert said.endswith(say(language, f"training.{key}", **fields))
        for typed in re.findall("`(/.*?)`", said):
            assert name in parse(typed).arguments.values()


@pytest.mark.parametrize(
    ("fault", "key"), [("settings", "training.failed_adapter"), ("ours", "training.failed_ours_adapter")]
)
def test_an_imported_adapter_that_failed_is_sent_again_by_its_own_command(it: Roles, fault: str, key: str) -> None:
    run(it, "/finetune faq.jsonl yes")
    write_now(it.database, lambda tx: tx.run("UPDATE job SET imported = 'upload'"))
    write_now(it.database, lambda tx: jobs.end(tx, 1, "failed", f"{fault}: a reason"))
    assert says(it, "/finetune status").endswith(say("en", key, title="Acme", id=1, reason="a reason"))


def test_a_job_that_failed_on_our_side_can_be_resumed_while_its_data_set_is_kept(it: Roles) -> None:
    language = "zh"
    run(it, "/finetune faq.jsonl yes")
    hear(it)
    write_now(it.database, lambda tx: jobs.fail(tx, 1, "ours", "a reason", resumable=True))
    fields = {"title": "Acme", "id": 1, "reason": "a reason"}
    said = says(it, "/finetune status", language=language)
    assert said.endswith(say(language, "training.failed_kept", **fields))
    assert "`/finetune resume 1`" in said
    write_now(it.database, lambda tx: tx.run("UPDATE dataset SET erased_ms = 1"))
    said = says(it, "/finetune status", language=language)
    assert said.endswith(say(language, "training.failed_ours", typed="faq.jsonl", **fields))
    write_now(it.database, lambda tx: tx.run("UPDATE dataset SET erased_ms = NULL"))
    assert run(it, "/finetune resume 1").after == (Effect.WAKE_TRAINING,)
    assert (job_row(it)["state"], job_row(it)["reason"]) == ("queued", "")


@pytest.mark.parametrize(("fault", "learned"), [("yours", True), ("settings", True), ("ours", False)])
def test_only_a_job_that_failed_on_our_side_with_a_checkpoint_can_be_resumed(
    it: Roles, fault: str, learned: bool
) -> None:
    run(it, "/finetune faq.jsonl yes")
    hear(it)
    write_now(it.database, lambda tx: jobs.fail(tx, 1, fault, "a reason", resumable=learned))
    assert "/finetune resume" not in says(it, "/finetune status")
    with pytest.raises(BadInput, match=r"not_resumable"):
        run(it, "/finetune resume 1")


def test_the_line_of_a_failure_is_said_once() -> None:
    language = "zh"
    first = say(language, "data.line", line=7, reason="x")
    rejected = say(language, "data.few_usable_rows", used=3, fewest=10, rejected=5, first=first)
    assert failure_reason(Failed("yours", rejected, line=7), language) == rejected
    assert failure_reason(Failed("yours", "x", line=7), language) == first


def test_a_reason_with_braces_and_markdown_is_only_shown(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    write_now(it.database, lambda tx: jobs.end(tx, 1, "failed", "ours: {x} {0} %s " + "long " * 200))
    text = says(it, "/finetune status")
    assert "{x} {0} %s" in text
    assert len(text) < 600


def test_list_shows_the_newest_first_and_only_this_channels(it: Roles) -> None:
    run(it, "/finetune a.jsonl yes")
    run(it, "/finetune cancel")
    run(it, "/finetune b.jsonl yes")
    run(it, "/finetune c.jsonl yes", "other_operator", "delta")
    lines = [line for line in says(it, "/finetune list").splitlines() if line.startswith("- ")]
    assert [("b.jsonl" in line, "a.jsonl" in line) for line in lines] == [(True, False), (False, True)]
    assert "cancelled" in lines[1]


def test_cancel_ends_a_job_once(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    outcome = run(it, "/finetune cancel 1")
    assert Effect.WAKE_TRAINING in outcome.after
    assert outcome.body.text == say("en", "training.cancelled_for_good", id=1, title="Acme")
    assert job_row(it)["state"] == "cancelled"
    assert says(it, "/finetune cancel 1") == say("en", "training.ended_already", id=1)
    assert says(it, "/finetune faq.jsonl yes")  # another may begin


@pytest.mark.parametrize("state", ["validating", "waiting", "queued", "running"])
def test_only_what_can_be_resumed_is_said_to_be(it: Roles, state: str) -> None:
    run(it, "/finetune faq.jsonl yes")
    hear(it)
    write_now(it.database, lambda tx: tx.run("UPDATE job SET started_ms = NULL") if state != "running" else 0)
    write_now(it.database, lambda tx: tx.run("UPDATE job SET state = ?", [state]))
    assert ("/finetune resume 1" in says(it, "/finetune cancel 1")) == (state == "running")
    if state == "running":
        assert says(it, "/finetune resume 1")
    else:
        with pytest.raises(BadInput):
            run(it, "/finetune resume 1")


def test_whoever_resumes_a_job_is_told_if_it_begins_anew(it: Roles) -> None:
    run(it, "/finetune faq.jsonl yes")
    hear(it)
    write_now(it.database, lambda tx: registry.keep_base(tx, "loaded"))
    for base in ("loaded", "another"):
        run(it, "/finetune cancel 1")
        said = run(it, "/finetune resume 1", prepared=base).body.text
        assert (say("en", "training.begins_anew") in said) == (base == "another")
        assert ("continues from its checkpoint" in said) == (base == "loaded")


def test_the_report_names_what_is_to_be_known_of_the_rows():
    plain = messages.data_text("en", CHECKED)
    known = replace(CHECKED, median_tokens=40, longest_tokens=311, missing=70, personal=("phone numbers: 2",))
    told = messages.data_text("en", known)
    assert plain == []
    assert "40" in told[0]
    assert "311" in told[0]
    assert "70" in told[1]
    assert "phone numbers: 2" in told[2]


def test_unreadable_texts_are_counted_in_the_answer_the_question_and_the_report(it: Roles) -> None:
    language = "zh"
    line = f"- {say(language, 'training.left_out', n=3)}"
    run(it, "/finetune feedback", prepared=PreparedData(SHA, "feedback", False, 3))

    def work(tx: Tx) -> None:
        for event in (CHECKED, Estimated(90, 0, 2, 60, 9000)):
            event_log.add_event(tx, 1, event)
        jobs.await_confirmation(tx, 1)
        tx.run("UPDATE delivery SET state = 'done'")

    write_now(it.database, work)
    assert line in says(it, "/finetune status", language=language).splitlines()
    write_now(it.database, lambda tx: event_log.clear(tx, 1))
    hear(it, CHECKED, DONE)
    publish(it, Judged("passed", 5, 5, "base", 3, 2, -1, -0.5, 0.4, 0.5))
    assert line in says(it, "/finetune status", language=language).splitlines()
    assert says(it, "/finetune feedback yes", language=language).count("- ") == 0
    run(it, "/finetune cancel")
    again = run(it, "/finetune feedback yes", language=language, prepared=PreparedData(SHA, "feedback", True, 3))
    assert again.body.text.splitlines()[-1] == line


def test_a_skill_that_is_lost_is_told_whatever_the_verdict() -> None:
    verdicts: tuple[Verdict, ...] = ("too_few", "no_better", "style_only", "forgets")
    for verdict, (high, skill, lost) in product(verdicts, ((0.04, 0.62, True), (0.06, 0.1, True), (0.04, 0.1, False))):
        judged = Judged(verdict, 5, 5, "base", 3, 2, -1, -0.5, 0.4, 0.5, 0.01, high, "arithmetic", skill, asked=5)
        told = "\n".join(messages.verdict_text("en", "acme@2", judged))
        assert (f"arithmetic, {skill:+.2f} (up to +0.20 counts as the same)" in told) == lost
        assert ("keeps the abilities" in told) != lost


@pytest.mark.parametrize(
    ("language", "first", "second"),
    [
        (
            "en",
            "`aaaaaaaaaaaa` without personal data, uploaded by you 2 h ago, licence: CC0",
            "faq.jsonl `aaaaaaaaaaaa`: ? rows, 1 kB, a file, uploaded by you 2 h ago, licence: not said",
        ),
        ("zh", "`aaaaaaaaaaaa` 去掉个人信息之后", "faq.jsonl `aaaaaaaaaaaa`：? 行，1 kB，文件"),
    ],
)
def test_data_lists_what_one_may_know_of_with_origin_and_licence(
    it: Roles, language: str, first: str, second: str
) -> None:
    def bring(tx: Tx) -> None:
        owner = it.hash("operator")
        tx.run(
            "UPDATE dataset SET brought_by = ?, created_ms = ?", [owner, hours_ago := tx.now_ms - 7_000_000]
        )  # rounded up: 2 h
        datasets.keep_derived(tx, SHA, "b" * 64, size_bytes=4200)
        datasets.count_rows(tx, "b" * 64, 90)
        tx.run("UPDATE dataset SET licence = 'CC0', created_ms = ? WHERE parent <> ''", [hours_ago + 1])
        datasets.keep_dataset(tx, "c" * 64, "feedback", source="feedback", size_bytes=1, brought_by=owner)

    write_now(it.database, bring)
    newest, oldest = (line for line in says(it, "/finetune data", language=language).splitlines() if line[:2] == "- ")
    assert first in newest
    assert all(fact in newest for fact in ("bbbbbbbbbbbb", "90", "4 kB"))
    assert second in oldest
    assert says(it, "/finetune data", "other_operator", "delta", language) == say(language, "training.no_data")
