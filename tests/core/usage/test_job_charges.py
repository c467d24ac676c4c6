"""The books of fine-tunes, over random histories: one charge for each version at the price that was pinned, or none."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import StorageError
from core.jobs import datasets, jobs
from core.storage.cipher import Cipher
from core.storage.database import Database, Tx
from core.usage import ledger, prices
from tests.support.database import read_now, write_now
from tests.support.roles import Roles, open_roles

SHA = "a" * 64
STEPS = st.one_of(
    st.tuples(st.just("price"), st.integers(0, 10**6), st.integers(0, 10_000)),
    st.tuples(st.just("ask"), st.one_of(st.none(), st.integers(0, 10**6)), st.just(0)),
    st.tuples(st.sampled_from(["cancel", "fail", "resume"]), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("publish"), st.integers(0, 5), st.integers(0, 2 * 10**6)),
)


def bring(it: Roles) -> None:
    owner = it.hash("operator")
    write_now(
        it.database,
        lambda tx: datasets.keep_dataset(tx, SHA, "faq.jsonl", source="file", size_bytes=1, brought_by=owner),
    )


def publish(tx: Tx, job_id: int, trained: int) -> None:
    """As the supervisor does, but for the version."""
    if jobs.end(tx, job_id, "published"):
        ledger.charge_job(tx, job_id, trained)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(history=st.lists(STEPS, max_size=25))
def test_every_version_has_one_charge_whatever_happens_in_which_order(
    history: list[tuple[str, int | None, int]],
) -> None:
    price, wanted = 0, {}
    told: dict[int, tuple[int, int | None]] = {}  # job -> (price when it was asked, tokens that were told)
    with tempfile.TemporaryDirectory() as folder, open_roles(Path(folder)) as it:
        bring(it)
        for what, number, other in history:

            def work(tx: Tx, what: str = what, number: int | None = number, other: int = other) -> None:
                nonlocal price
                caller = it.caller(tx, "operator")
                if what == "price":
                    assert number is not None
                    price = number
                    prices.set_price(tx, caller.channel.id, 1, 2, other, price)
                elif what == "ask":
                    job = jobs.create(tx, caller, SHA)
                    jobs.pin_price(tx, job.id, number)
                    told[job.id] = price, number
                elif number in told:
                    if what == "publish":
                        if jobs.state_of(tx, number) in jobs.OPEN:
                            nano, most = told[number]
                            tokens = other if most is None else min(most, other)
                            wanted[number] = tokens, tokens * nano
                        publish(tx, number, other)
                    elif what == "resume":
                        if jobs.state_of(tx, number) == "cancelled":
                            jobs.resume(tx, number)
                    else:
                        jobs.end(tx, number, "cancelled" if what == "cancel" else "failed")

            write_now(it.database, work)
            assert read_now(it.database, ledger.check) == []
        rows = read_now(it.database, lambda tx: tx.all("SELECT * FROM ledger"))
        assert {row["job_id"]: (row["tokens_trained"], row["gross_nano"]) for row in rows} == wanted
        assert len(rows) == len(wanted)
        assert all(row["owner_nano"] == row["gross_nano"] for row in rows)


def test_a_job_is_charged_once_and_one_that_trains_nothing_never(tmp_path: Path) -> None:
    with open_roles(tmp_path) as it:
        bring(it)
        job = write_now(it.database, lambda tx: jobs.create(tx, it.caller(tx, "operator"), SHA))
        write_now(it.database, lambda tx: publish(tx, job.id, 10))
        assert it.rows()["ledger"] == []
        priced = write_now(it.database, lambda tx: jobs.create(tx, it.caller(tx, "operator"), SHA))
        write_now(it.database, lambda tx: jobs.pin_price(tx, priced.id))
        write_now(it.database, lambda tx: publish(tx, priced.id, 10))
        with pytest.raises(StorageError, match="UNIQUE"):
            write_now(it.database, lambda tx: ledger.charge_job(tx, priced.id, 10))
        assert read_now(it.database, ledger.check) == []


DAMAGES = (
    ("UPDATE job SET state = 'failed'", "I2 a job"),
    ("UPDATE job SET price_id = NULL", "I2 a job"),
    ("UPDATE job SET tokens_agreed = 3", "I4 a job"),
    ("UPDATE price SET train_nano = train_nano + 1", "I4 a job"),
    ("UPDATE usage_daily SET jobs_nano = jobs_nano - 1", "I1"),
    ("DELETE FROM job", "I2 a job"),
)


def test_the_checker_finds_each_kind_of_damage(tmp_path: Path) -> None:
    with open_roles(tmp_path) as it:
        bring(it)
        it.run("owner", "/channel set acme price_train=5")
        job = write_now(it.database, lambda tx: jobs.create(tx, it.caller(tx, "operator"), SHA))
        write_now(it.database, lambda tx: jobs.pin_price(tx, job.id, 10))
        write_now(it.database, lambda tx: publish(tx, job.id, 10))
        assert read_now(it.database, ledger.check) == []
    for number, (damage, found) in enumerate(DAMAGES):
        path = tmp_path / f"{number}.db"
        shutil.copyfile(tmp_path / "a.db", path)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute(damage)
            connection.commit()
        with Database(path, Cipher(b"k" * 32)) as database:
            assert any(problem.startswith(found) for problem in read_now(database, ledger.check)), damage
