"""The retry policy of the way out: one bound, growing pauses, storage waited out."""

from __future__ import annotations

import asyncio

import pytest

from core.delivery import retry
from core.delivery.retry import DeliveryFailed, deliver, wait_for_storage
from core.errors import Overloaded, StorageError, StorageFull, StorageRefused, StoredUnreadable
from core.platform import Unreachable


class Clock:
    """A clock that only a pause advances."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Attempt:
    """Raises the given errors, one a call, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "written"


async def test_pauses_double_up_to_the_longest() -> None:
    clock, attempt = Clock(), Attempt(*[ConnectionError() for _ in range(8)])
    assert await deliver(attempt, clock=clock, sleep=clock.sleep) == "written"
    assert clock.pauses == [0.5, 1, 2, 4, 8, 15, 15, 15]


async def test_after_the_bound_the_delivery_has_failed() -> None:
    clock, attempt = Clock(), Attempt(*[ConnectionError() for _ in range(10_000)])
    with pytest.raises(DeliveryFailed):
        await deliver(attempt, clock=clock, sleep=clock.sleep)
    assert retry.BOUND_S - 15 <= clock.now - 100.0 < retry.BOUND_S == 600


async def test_time_inside_the_sink_counts() -> None:
    with pytest.raises(DeliveryFailed):
        await deliver(asyncio.Event().wait, bound_s=0.01)


async def test_who_cannot_be_reached_is_not_tried_again() -> None:
    attempt = Attempt(Unreachable())
    with pytest.raises(DeliveryFailed):
        await deliver(attempt)
    assert attempt.calls == 1


@pytest.mark.parametrize("error", [StorageFull(), StorageError(), Overloaded(retry_after_s=1)])
async def test_a_storage_that_cannot_write_is_waited_out_and_is_no_failure_of_the_platform(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "STORAGE_S", 0.0)
    attempt = Attempt(error)
    with pytest.raises(type(error)):
        await deliver(attempt)
    attempt = Attempt(*[error] * 50)
    assert await wait_for_storage(attempt) == "written"


@pytest.mark.parametrize("error", [StorageRefused(), StoredUnreadable()])
async def test_what_does_not_pass_is_not_waited_for(error: Exception) -> None:
    with pytest.raises(type(error)):
        await wait_for_storage(Attempt(error))
    clock = Clock()
    assert await deliver(Attempt(error), clock=clock, sleep=clock.sleep) == "written"
