"""Rows of jobs, events and data sets: versions, bounds, ends, and who may know of which data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from core.delivery.deliveries import new_delivery
from core.jobs import datasets, event_log, jobs
from core.jobs.jobs import Job
from core.jobs.protocol import Checked, Done, Evaluated, JobEvent, Progress, Warned
from core.storage.database import Tx
from tests.support.database import read_now, write_now
from tests.support.roles import Roles, open_roles

SHA, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Roles]:
    with open_roles(tmp_path) as made:
        yield made


def bring(it: Roles, sha256: str, name: str = "faq.jsonl", who: str = "operator", source: str = "file") -> None:
    brought_by = it.hash(who)
    write_now(
        it.database,
        lambda tx: datasets.keep_dataset(tx, sha256, name, source=source, size_bytes=1, brought_by=brought_by),
    )


def order(it: Roles, sha256: str = SHA, name: str = "faq.jsonl", who: str = "operator", place: str = "acme") -> Job:
    def work(tx: Tx) -> Job:
        job = jobs.create(tx, it.caller(tx, who, place), sha256, name)
        new_delivery(tx, job_id=job.id)
        return job

    return write_now(it.database, work)


def step(number: int) -> Progress:
    return Progress(number, 100, 1, 1, 1.0 / number, 10.0, 5.0)


def events(it: Roles, job: Job) -> list[JobEvent]:
    return read_now(it.database, lambda tx: event_log.events(tx, job.id))


def hear(it: Roles, job: Job, *heard: JobEvent) -> None:
    def work(tx: Tx) -> None:
        for event in heard:
            jobs.add_event(tx, job.id, event)

    write_now(it.database, work)


def is_erased(it: Roles, sha256: str) -> bool:
    return read_now(it.database, lambda tx: datasets.is_erased(tx, sha256))


# --- jobs ---


def test_a_version_is_never_given_twice(it: Roles) -> None:
    bring(it, SHA)
    first = order(it)
    write_now(it.database, lambda tx: jobs.end(tx, first.id, "failed", "ours: x"))
    write_now(
        it.database,
        lambda tx: tx.insert(
            "adapter", sha256="c" * 64, name="acme", version=7, base_fingerprint="f", manifest="{}", created_ms=0
        ),
    )
    assert (first.label, order(it).label, order(it, place="delta").label) == ("acme@1", "acme@8", "delta@1")


def test_a_job_ends_once(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    assert write_now(it.database, lambda tx: jobs.end(tx, job.id, "failed", "ours: x"))
    assert not write_now(it.database, lambda tx: jobs.end(tx, job.id, "published"))
    assert not write_now(it.database, lambda tx: jobs.cancel(tx, job.id, jobs.REQUESTED))
    assert not write_now(it.database, lambda tx: jobs.start(tx, job.id))
    assert read_now(it.database, lambda tx: jobs.state_of(tx, job.id)) == "failed"


def test_due_is_what_is_open_and_what_is_not_told_yet_oldest_first(it: Roles) -> None:
    bring(it, SHA)
    first, second, third = (order(it) for _ in range(3))
    write_now(it.database, lambda tx: jobs.start(tx, first.id))
    write_now(it.database, lambda tx: jobs.end(tx, first.id, "failed", "ours: x"))
    write_now(it.database, lambda tx: jobs.cancel(tx, second.id, jobs.REQUESTED))
    assert [job.id for job in read_now(it.database, jobs.due)] == [first.id, third.id]
    write_now(it.database, lambda tx: jobs.drop_message(tx, first.id))
    assert [job.id for job in read_now(it.database, jobs.due)] == [third.id]


def test_a_waiting_job_that_is_ended_by_an_erasure_still_tells_it(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    write_now(it.database, lambda tx: jobs.cancel(tx, job.id, "erased"))
    assert [one.id for one in read_now(it.database, jobs.due_checks)] == [job.id]


def test_publishing_needs_a_running_job_and_its_folder_is_known_afterwards(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    assert not write_now(it.database, lambda tx: jobs.publishing(tx, job.id, OTHER))
    write_now(it.database, lambda tx: jobs.start(tx, job.id))
    assert write_now(it.database, lambda tx: jobs.publishing(tx, job.id, OTHER))
    assert read_now(it.database, lambda tx: event_log.published_folder(tx, job.id)) == OTHER
    assert read_now(it.database, lambda tx: event_log.unpublished_folder(tx, job.id)) == OTHER
    assert events(it, job) == []


# --- events ---


@pytest.mark.parametrize("steps", [30, 20_000])
def test_of_progress_the_first_the_newest_and_a_curve_between_them_are_kept(it: Roles, steps: int) -> None:
    bring(it, SHA)
    job = order(it)
    said = [replace(step(n), steps=steps) for n in range(1, steps + 1, max(1, steps // 500))]
    hear(it, job, *said)
    kept = events(it, job)
    assert (kept[0], kept[-1]) == (said[0], said[-1])
    assert min(len(said), event_log.CURVE_POINTS) <= len(kept) <= event_log.CURVE_POINTS + 2
    apart = [after.step - before.step for before, after in pairwise(kept[:-1]) if isinstance(after, Progress)]
    assert max(apart) <= 2 * max(1, steps // event_log.CURVE_POINTS)


def test_a_trainer_that_goes_back_begins_no_second_curve(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    hear(it, job, step(1), step(30), step(60), step(31), step(32), step(61))
    assert [event.step for event in events(it, job) if isinstance(event, Progress)] == [1, 30, 60, 61]


def test_progress_forgives_the_trainers_that_died_before_it(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    hear(it, job, step(5))
    for expected in (1, 2):
        assert write_now(it.database, lambda tx: jobs.count_attempt(tx, job.id)) == expected
    hear(it, job, step(5))  # as far as it had been before
    assert write_now(it.database, lambda tx: jobs.count_attempt(tx, job.id)) == 3
    hear(it, job, step(6))
    assert write_now(it.database, lambda tx: jobs.count_attempt(tx, job.id)) == 1


def test_what_a_resumed_trainer_says_again_is_kept_once(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    said: tuple[JobEvent, ...] = (
        Checked(10, 10, 0, 100, 8, 1, 1, rejected=("line 1: no",)),
        Warned("careful"),
        Evaluated(4, "validation", 1.0, 1),
        Done(4, 1.0, 3.0, 1.0, 2.0, 1.0),
    )
    hear(it, job, *said, *said)
    assert {event.kind for event in events(it, job)} == {"checked", "warned", "evaluated", "finished"}
    assert len(events(it, job)) == 4


def test_a_talkative_trainer_does_not_fill_the_database(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    hear(it, job, *(Warned(f"warning {n}") for n in range(event_log.MAX_EVENTS + 50)), step(1))
    assert len(events(it, job)) == event_log.MAX_EVENTS + 1


# --- data sets ---


def known(it: Roles, who: str, typed: str) -> tuple[str, str] | None:
    return read_now(it.database, lambda tx: datasets.known_dataset(tx, it.hash(who), typed))


def test_people_know_what_they_brought_and_what_their_channels_read(it: Roles) -> None:
    bring(it, SHA)
    assert known(it, "operator", "faq.jsonl") == (SHA, "faq.jsonl")
    assert known(it, "operator", SHA[:8]) == (SHA, "faq.jsonl")
    assert known(it, "owner", "faq.jsonl") is None  # no job has read it yet
    order(it)
    assert known(it, "owner", "faq.jsonl") == (SHA, "faq.jsonl")


def test_nobody_else_knows_of_it(it: Roles) -> None:
    bring(it, SHA)
    order(it)
    for who in ("other_operator", "user", "stranger", "removed"):
        assert [known(it, who, typed) for typed in ("faq.jsonl", SHA, SHA[:8])] == [None] * 3


def test_a_part_of_a_name_is_not_the_name(it: Roles) -> None:
    bring(it, SHA)
    assert [known(it, "operator", typed) for typed in ("", "faq", SHA[:7], "%", "a%")] == [None] * 5


def test_the_same_bytes_have_each_partners_own_name(it: Roles) -> None:
    bring(it, SHA, "ours.jsonl")
    order(it, name="ours.jsonl")
    bring(it, SHA, "theirs.jsonl", who="other_operator")
    theirs = order(it, name="theirs.jsonl", who="other_operator", place="delta")
    assert theirs.dataset == "theirs.jsonl"
    assert known(it, "other_operator", "theirs.jsonl") == (SHA, "theirs.jsonl")
    assert known(it, "other_operator", SHA[:12]) == (SHA, "theirs.jsonl")
    assert known(it, "other_operator", "ours.jsonl") is None
    assert known(it, "operator", "theirs.jsonl") is None
    assert known(it, "operator", SHA[:12]) == (SHA, "ours.jsonl")


def test_what_people_said_is_known_to_no_other_channel_and_ends_with_its_job(it: Roles) -> None:
    bring(it, SHA, datasets.CONVERSATIONS, source=datasets.CONVERSATIONS)
    first, second = order(it), order(it)
    assert known(it, "owner", SHA) is None
    write_now(it.database, lambda tx: jobs.end(tx, first.id, "failed", "ours: x"))
    assert not is_erased(it, SHA)
    write_now(it.database, lambda tx: jobs.cancel(tx, second.id, jobs.REQUESTED))
    assert is_erased(it, SHA)


def test_a_file_stays_when_its_job_ends(it: Roles) -> None:
    bring(it, SHA)
    job = order(it)
    write_now(it.database, lambda tx: jobs.end(tx, job.id, "published"))
    assert not is_erased(it, SHA)
    assert is_erased(it, OTHER)


def test_an_erased_data_set_is_not_known_until_it_is_brought_again(it: Roles) -> None:
    bring(it, SHA)
    write_now(it.database, lambda tx: tx.run("UPDATE dataset SET erased_ms = 1"))
    assert known(it, "operator", "faq.jsonl") is None
    bring(it, SHA)
    assert known(it, "operator", "faq.jsonl") == (SHA, "faq.jsonl")
