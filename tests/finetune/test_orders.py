"""A trainer waits while people are answered, never for long, and a stop is heard while it waits."""

from __future__ import annotations

import threading
import time

import pytest

from core.job import GO_ON, WAIT
from finetune import orders
from finetune.orders import Orders


def test_it_waits_until_it_may_go_on() -> None:
    told = Orders()
    assert not told.is_set()
    told.hear(WAIT)
    timer = threading.Timer(0.2, told.hear, [WAIT + GO_ON])
    timer.start()
    began = time.monotonic()
    assert not told.is_set()
    assert 0.1 < time.monotonic() - began < orders.LONGEST_WAIT_S


def test_a_stop_ends_the_waiting() -> None:
    told = Orders()
    told.hear(GO_ON + WAIT)
    threading.Timer(0.1, told.set).start()
    began = time.monotonic()
    assert told.is_set()
    assert time.monotonic() - began < orders.LONGEST_WAIT_S
    assert told.is_set()


def test_a_chat_that_never_rests_does_not_hold_it_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "LONGEST_WAIT_S", 0.05)
    told = Orders()
    told.hear(WAIT)
    assert not told.is_set()
    assert not told.is_set()
