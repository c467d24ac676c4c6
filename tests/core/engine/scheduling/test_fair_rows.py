"""Rows are shared fairly: floods are preempted without loss, and no adapter waits forever."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.engine.lora.adapter_files import AdapterTarget, AdapterWeights, load_adapter
from core.engine.lora.slots import linear_shapes
from core.engine.protocol import Finished, FinishReason, Scope
from core.engine.scheduling.request_state import RequestState
from core.errors import EngineError, Overloaded
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.support.engine_dialogue import is_blank
from tests.support.engine_steps import Steps

STEP_S = 0.05  # what a step of 8 rows takes on two cores


@pytest.fixture(scope="module")
def endless(base: BaseModel) -> BaseModel:
    return dataclasses.replace(base, eos_ids=frozenset())


@pytest.fixture(scope="module")
def weights(base: BaseModel, adapters: list[AdapterRef]) -> Mapping[str, AdapterWeights]:
    fits = AdapterTarget(base.fingerprint, linear_shapes(base.module))
    loaded = load_adapter(adapters[2], fits)
    return {name: dataclasses.replace(loaded, sha256=name) for name in "ABCDEFGH"}


def p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


def waits_of_the_others(model: BaseModel, *, flooded: bool) -> list[float]:
    """Five partners ask now and then; one floods 100 to 1 through 50 channels, with answers of 300 tokens."""
    steps = Steps(model, max_rows=8, max_waiting=256, reuse_mib=64)
    asked: dict[str, int] = {}
    for now in range(160):
        calm = now % 10 == 5
        if flooded:
            for i in range(500 if now == 0 else 100 * calm):
                scope = Scope("flood", f"c{i % 50}", f"u{i % 7}", f"v{now}-{i}")
                with suppress(Overloaded):
                    steps.submit(f"20:flood {now} {i}", scope, max_tokens=300)
        if calm:
            name = f"20:calm {now}"
            asked[name] = now
            steps.submit(name, Scope(f"p{now // 10 % 5}", "c", "u", name), max_tokens=20)
        steps.step()
    while asked.keys() - steps.begun.keys():
        steps.step()
    assert len(steps.thread.queue) <= 256 + 8
    return [(steps.begun[name] - at) * STEP_S for name, at in asked.items()]


def test_a_flood_through_fifty_channels_does_not_delay_other_partners(endless: BaseModel) -> None:
    alone, beside = waits_of_the_others(endless, flooded=False), waits_of_the_others(endless, flooded=True)
    assert p95(beside) <= 2 * p95(alone) + 2


@pytest.mark.parametrize("level", ["partner", "channel", "user"])
def test_a_party_without_a_row_gets_one_within_some_steps(endless: BaseModel, level: str) -> None:
    steps = Steps(endless, max_rows=4)
    for i in range(20):
        steps.submit(f"9:f{i}", Scope(**{level: "flood", "conversation": f"{i}"}), max_tokens=200)
    for _ in range(10):
        steps.step()
    steps.submit("9:calm", Scope(**{level: "calm"}))
    steps.until_over("9:calm", within=10 + 4 + 8)


@pytest.mark.parametrize("conversation", ["", "v"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_preempted_answer_resumes_with_the_same_text_and_usage(
    endless: BaseModel, weights: Mapping[str, AdapterWeights], conversation: str, temperature: float
) -> None:
    """Its text, its usage and its first event are those of an answer that had its row to itself."""

    def run(*, disturbed: bool) -> Steps:
        steps = Steps(endless, weights, max_rows=2)
        for i in range(2):
            scope = Scope("flood", "c", "u", conversation and f"{conversation}{i}")
            steps.submit(f"30:f{i}", scope, adapter="AB"[i], max_tokens=40, temperature=temperature, seed=i)
        for _ in range(10):
            steps.step()
        if disturbed:
            steps.submit("5:calm", Scope("calm"), max_tokens=10)
            steps.until_over("5:calm", within=40)
            assert len(steps.begun) == 3
            assert not steps.over.keys() & {"30:f0", "30:f1"}
        steps.until_over("30:f0", "30:f1", within=100)
        assert is_blank(steps.thread.runner.cache)
        assert not steps.thread.runner.lora.users
        return steps

    alone, beside = run(disturbed=False), run(disturbed=True)
    for name in ("30:f0", "30:f1"):
        assert beside.texts[name] == alone.texts[name]
        assert beside.over[name] == alone.over[name]


def test_a_preempted_request_is_the_next_to_resume(endless: BaseModel) -> None:
    steps = Steps(endless, max_rows=2)
    for i in range(4):
        steps.submit(f"30:f{i}", Scope("flood"), max_tokens=100)
    for _ in range(5):
        steps.step()
    victim = steps.thread.rows.states[-1]
    steps.submit("5:calm", Scope("calm"), max_tokens=3)
    steps.step()
    assert victim not in steps.thread.rows.states
    steps.until_over("5:calm", within=15)
    steps.step()
    assert victim in steps.thread.rows.states
    assert steps.begun.keys() == {"30:f0", "30:f1", "5:calm"}


def who_made_room(steps: Steps) -> RequestState:
    """Of two rows of a flood, the one that has just gone for a calm one's sake."""
    for i in range(2):
        steps.submit(f"30:f{i}", Scope("flood"), max_tokens=400)
    for _ in range(5):
        steps.step()
    victim = steps.thread.rows.states[-1]
    steps.submit("5:calm", Scope("calm"), max_tokens=20)
    for _ in range(3):
        steps.step()
    assert victim not in steps.thread.rows.states
    return victim


def test_a_request_that_is_no_longer_urgent_delays_no_other(endless: BaseModel) -> None:
    """Room was to be made for it; while it was prepared a row fell free, and another took it."""
    steps = Steps(endless, max_rows=3)
    flood = [Scope("flood", f"c{i}", "u", "") for i in range(6)]
    for name, scope, tokens in (("20:a", flood[1], 12), ("21:b", flood[1], 300), ("22:c", flood[2], 300)):
        steps.submit(name, scope, max_tokens=tokens)
    while len(steps.begun) < 3:
        steps.step()
    later: list[Callable[[], None]] = []
    steps.thread.queue._spawn = later.append
    for i, name in ((3, "23:d"), (4, "24:e"), (5, "25:urgent")):
        steps.submit(name, flood[i], max_tokens=300)
    steps.step()
    steps.until_over("20:a", within=40)
    assert len(later) == 3
    for work in later:
        work()
    steps.thread.queue._spawn = lambda work: work()
    steps.step()
    assert "25:urgent" not in steps.begun  # three channels have a row each
    steps.submit("26:calm", Scope("calm", "c", "u", ""), max_tokens=4)
    for _ in range(3):
        steps.step()
    assert "26:calm" in steps.begun


def test_a_preempted_request_can_be_cancelled(endless: BaseModel) -> None:
    steps = Steps(endless, max_rows=2)
    victim = who_made_room(steps)
    steps.thread.cancel(victim)
    steps.step()
    over = steps.over[victim.request.id]
    assert isinstance(over, Finished)
    assert over.reason is FinishReason.CANCELLED
    assert over.usage.completion_tokens >= 3
    steps.until_over("5:calm", within=40)


def test_a_preempted_request_with_a_text_error_delays_no_other(endless: BaseModel) -> None:
    steps = Steps(endless, max_rows=2)
    victim = who_made_room(steps)

    def nameless() -> str:
        raise TypeError("a token without a text")

    victim.detokenizer.flush = nameless  # type: ignore[method-assign]
    steps.thread.cancel(victim)
    steps.until_over("5:calm", within=40)
    assert isinstance(steps.over[victim.request.id], EngineError)
    assert isinstance(steps.over["5:calm"], Finished)


def test_a_request_without_an_adapter_slot_is_not_passed_forever(
    endless: BaseModel, weights: Mapping[str, AdapterWeights]
) -> None:
    """A, B, A, A, A, ...: one slot, two rows that never end together, and there is always another A to go first."""
    steps = Steps(endless, weights, max_rows=2, adapters_at_once=1)
    steps.submit("5:A", Scope("p", "a"), adapter="A", max_tokens=4)
    steps.submit("5:B", Scope("p", "a"), adapter="B")
    for i in range(40):
        steps.submit(f"5:A{i}", Scope("p", "a"), adapter="A")
        steps.step()
        assert steps.thread.runner.lora.slot_count <= 1
    assert "5:B" in steps.over
    assert len(steps.over) < 20


def test_few_adapter_slots_leave_few_rows_empty(endless: BaseModel, weights: Mapping[str, AdapterWeights]) -> None:
    """Eight adapters in three slots take little longer than in eight: whoever waits for a slot stops no other rows."""
    took = []
    for slots in (8, 3):
        dice = random.Random(0)
        steps = Steps(endless, weights, max_rows=8, adapters_at_once=slots, max_waiting=200)
        names = [f"5:{i}" for i in range(150)]
        for i, name in enumerate(names):
            adapter, tokens = dice.choice("ABCDEFGH"), dice.randint(2, 14)
            steps.submit(name, Scope("p", f"c{i % 5}"), adapter=adapter, max_tokens=tokens)
        steps.until_over(*names, within=1000)
        took.append(steps.now)
    assert took[1] <= 1.2 * took[0]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ABCDEFGH*"), st.integers(1, 6)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_any_order_of_adapters_is_answered(
    endless: BaseModel, weights: Mapping[str, AdapterWeights], asked: list[tuple[str, int]], rows: int, slots: int
) -> None:
    """With fewer slots than adapters and rows; * is the bare model, which needs none."""
    steps = Steps(endless, weights, max_rows=rows, adapters_at_once=slots)
    for i, (adapter, tokens) in enumerate(asked):
        name = "" if adapter == "*" else adapter
        steps.submit(f"4:{i}", Scope(f"p{i % 3}", f"c{i % 2}"), adapter=name, max_tokens=tokens)
    steps.until_over(*(f"4:{i}" for i in range(len(asked))), within=30 * (6 + 4))
    assert all(isinstance(one, Finished) for one in steps.over.values())
    assert steps.thread.runner.lora.slot_count <= slots
    assert len(steps.thread.queue) == 0
    assert is_blank(steps.thread.runner.cache)


def test_overloaded_carries_an_estimate_of_the_wait(endless: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, answers of 8 steps of half a second: six who wait are gone in 12 s, however long they waited before."""
    steps = Steps(endless, max_rows=2, max_waiting=4)
    monkeypatch.setattr("core.engine.runtime.loop.time.monotonic", lambda: steps.now * 0.5)
    asked = 0
    while len(steps.over) < 40:
        while len(steps.thread.queue) < 4:
            asked += 1
            steps.submit(f"5:{asked}", Scope("p"))
        steps.step()
    while len(steps.thread.queue._scheduler) < 4:
        asked += 1
        steps.submit(f"5:{asked}", Scope("p"))
    with pytest.raises(Overloaded) as caught:
        steps.submit("5:too many", Scope("p"))
    assert caught.value.retry_after_s == pytest.approx(len(steps.thread.queue) / 2 * 8 * 0.5, rel=0.25)
