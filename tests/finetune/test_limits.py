"""What a file may cost: more time or memory than that is a refusal that says so, and the bounds are off again."""

from __future__ import annotations

import resource
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from core.errors import BadDataset
from core.jobs.protocol import Spec
from finetune import prepare
from finetune.limits import TooCostly, bounded, held_bytes
from tests.finetune.conftest import Heard, MakeJob, faq

MIB = 2**20


def bounds() -> tuple[object, ...]:
    timer, handler = signal.getitimer(signal.ITIMER_PROF), signal.getsignal(signal.SIGPROF)
    return resource.getrlimit(resource.RLIMIT_DATA), timer, handler


def spin(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        sum(range(1000))


def test_too_much_time_of_the_processor_is_refused_and_waiting_is_none() -> None:
    before = bounds()
    with bounded(seconds=0.2):
        time.sleep(0.4)
    with pytest.raises(TooCostly, match="time"), bounded(seconds=0.2):
        spin(5)
    assert bounds() == before
    spin(0.3)


@pytest.mark.slow
def test_too_much_memory_is_refused_and_what_is_held_already_does_not_count() -> None:
    held, before = bytearray(300 * MIB), bounds()
    with bounded(memory_bytes=200 * MIB):
        assert len(bytearray(100 * MIB)) == 100 * MIB
    with pytest.raises(TooCostly, match="memory"), bounded(memory_bytes=200 * MIB):
        bytearray(300 * MIB)
    assert bounds() == before
    assert len(bytearray(300 * MIB)) == len(held)


def test_what_else_fails_inside_fails_as_it_is() -> None:
    before = bounds()
    with pytest.raises(ZeroDivisionError), bounded():
        raise ZeroDivisionError
    assert bounds() == before


def test_beside_the_main_thread_memory_is_still_bound() -> None:
    found: list[str] = []

    def work() -> None:
        try:
            with bounded(memory_bytes=200 * MIB):
                bytearray(300 * MIB)
        except TooCostly as error:
            found.append(error.what)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["memory"]


class SpinsInItsFinaliser:
    def __del__(self) -> None:
        while True:  # until the limit's error, which Python ignores here
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_is_met_where_errors_are_ignored_still_holds() -> None:
    def read() -> None:
        del [SpinsInItsFinaliser()][:]
        while True:
            pass

    with pytest.raises(TooCostly), bounded(seconds=0.02):
        read()


def test_the_kernels_figures_are_bytes() -> None:
    held = bytearray(64 * MIB)
    assert len(held) < held_bytes("VmData")
    assert len(held) < held_bytes("VmHWM") < 64 * 2**30
    with pytest.raises(OSError, match="VmNothing"):
        held_bytes("VmNothing")


@pytest.mark.parametrize(
    ("cost", "english", "chinese"),
    [("time", "more than 480 s of this machine", "480 秒"), ("memory", "more than 4 GB of memory", "4 GB 内存")],
)
def test_a_file_that_costs_too_much_is_refused_with_a_way_out(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, cost: str, english: str, chinese: str
) -> None:
    if cost == "time":
        folder = make_job(data=faq(3000))
        monkeypatch.setattr(prepare, "bounded", partial(bounded, seconds=0.02))
    else:
        folder = make_job()
        monkeypatch.setattr(prepare, "bounded", partial(bounded, memory_bytes=200 * MIB))
        monkeypatch.setattr(prepare, "read", lambda path, columns: bytearray(300 * MIB))
    heard = Heard()
    with pytest.raises(BadDataset) as caught:
        prepare.prepare(folder, Spec.read(folder), heard)
    reason = caught.value.fields["reason"]
    assert english in reason.render("en")
    assert "split the file" in reason.render("en")
    assert chinese in reason.render("zh")
    assert heard == []
    assert sorted(path.name for path in Path(folder).iterdir()) == ["data.jsonl", "spec.json"]
