"""Fairness and bounds of the waiting queue, on plain items."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.protocol import Scope
from core.engine.scheduling import scheduler as module
from core.engine.scheduling.scheduler import QueueFull, Scheduler, row_to_preempt


class Item:
    def __init__(self, scope: Scope, cost: int = 10) -> None:
        self.scope, self.cost = scope, cost


SCOPES = st.builds(Scope, st.sampled_from("pq"), st.sampled_from("cd"), st.sampled_from("uv"))


def serve(scheduler: Scheduler[Item], turns: int) -> list[Item]:
    """Run one item after the other, each charged with its cost."""
    served = []
    for _ in range(turns):
        item = scheduler.take()
        if item is None:
            break
        scheduler.charge(item.scope, item.cost)
        scheduler.done(item.scope)
        served.append(item)
    return served


def flood(scheduler: Scheduler[Item], scope: Scope, count: int, cost: int = 10) -> None:
    for _ in range(count):
        scheduler.add(Item(scope, cost), scope)


@given(st.lists(st.tuples(SCOPES, st.integers(1, 50)), max_size=40))
def test_every_item_is_served_once_and_in_order_for_each_user(asked: list[tuple[Scope, int]]) -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=100)
    items = [Item(scope, cost) for scope, cost in asked]
    for item in items:
        scheduler.add(item, item.scope)
    served = serve(scheduler, 100)
    assert sorted(map(id, served)) == sorted(map(id, items))
    for scope in {item.scope for item in items}:
        assert [i for i in served if i.scope == scope] == [i for i in items if i.scope == scope]
    assert len(scheduler) == 0
    assert not scheduler.root.present


@given(st.integers(1, 30), st.integers(1, 30))
def test_two_who_always_wait_are_served_equal_tokens_to_within_one_item(cost_p: int, cost_q: int) -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=1000)
    for name, cost in (("p", cost_p), ("q", cost_q)):
        flood(scheduler, Scope(partner=name), 100, cost)
    served = serve(scheduler, 60)
    tokens = {name: sum(i.cost for i in served if i.scope.partner == name) for name in "pq"}
    assert abs(tokens["p"] - tokens["q"]) <= max(cost_p, cost_q)


@given(st.sampled_from([0.25, 0.5, 2.0, 4.0]), st.integers(1, 20))
def test_a_partner_of_twice_the_weight_is_served_twice_as_much(weight: float, cost: int) -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=1000)
    flood(scheduler, Scope(partner="plain"), 200, cost)
    flood(scheduler, Scope(partner="weighty", weight=weight), 200, cost)
    served = [item.scope.partner for item in serve(scheduler, 100)]
    assert served.count("weighty") / served.count("plain") == pytest.approx(weight, rel=0.25)


@pytest.mark.parametrize("level", ["partner", "channel", "user"])
def test_a_flood_does_not_hold_up_another_at_its_level(level: str) -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=1000)
    flood(scheduler, Scope(**{level: "flood"}), 100)
    serve(scheduler, 5)
    flood(scheduler, Scope(**{level: "calm"}), 1)
    served = serve(scheduler, 2)
    assert "calm" in [getattr(item.scope, level) for item in served]


def test_absence_earns_no_credit() -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=1000)
    flood(scheduler, Scope(partner="late"), 1)
    serve(scheduler, 1)
    flood(scheduler, Scope(partner="busy"), 100)
    serve(scheduler, 50)
    flood(scheduler, Scope(partner="late"), 50)
    served = [item.scope.partner for item in serve(scheduler, 10)]
    assert 4 <= served.count("busy") <= 6


def test_the_last_party_to_leave_keeps_its_counter() -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=1000)
    flood(scheduler, Scope(partner="a"), 50)
    serve(scheduler, 50)
    flood(scheduler, Scope(partner="b"), 10)
    flood(scheduler, Scope(partner="a"), 10)
    served = [item.scope.partner for item in serve(scheduler, 10)]
    assert 4 <= served.count("a") <= 6


def test_a_full_queue_displaces_the_flood_for_others_only() -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=3)
    own = Scope(partner="flood")
    items = [Item(own) for _ in range(3)]
    for item in items:
        assert scheduler.add(item, own) is None
    with pytest.raises(QueueFull):
        scheduler.add(Item(own), own)
    calm = Scope(partner="calm")
    assert scheduler.add(Item(calm), calm) is items[-1]
    with pytest.raises(QueueFull):
        scheduler.add(Item(calm), calm)
    assert len(scheduler) == 3


def test_rows_are_shared_within_a_partner_too() -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=4)
    flood(scheduler, Scope("p", "c", "u"), 4)
    other = Scope("p", "d", "u")
    assert scheduler.add(Item(other), other) is not None
    friend = Scope("p", "c", "v")
    assert scheduler.add(Item(friend), friend) is not None


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "remove", "done"]), SCOPES), max_size=80))
def test_counts_always_agree_and_the_queue_is_bounded(steps: list[tuple[str, Scope]]) -> None:
    scheduler: Scheduler[Item] = Scheduler(max_waiting=5)
    waiting: list[Item] = []
    running: list[Item] = []
    for what, scope in steps:
        if what == "add":
            item = Item(scope)
            try:
                displaced = scheduler.add(item, scope)
            except QueueFull:
                assert len(waiting) == 5
                continue
            waiting.append(item)
            if displaced is not None:
                waiting.remove(displaced)
        elif what == "take":
            taken = scheduler.take()
            assert (taken is None) == (not waiting)
            if taken is not None:
                waiting.remove(taken)
                running.append(taken)
                scheduler.charge(taken.scope, 7)
        elif what == "remove" and waiting:
            assert scheduler.remove(waiting[0])
            assert not scheduler.remove(waiting.pop(0))
        elif what == "done" and running:
            scheduler.done(running.pop(0).scope)
        assert list(scheduler.items()) == waiting
        assert len(scheduler) == len(waiting) <= 5
        assert (scheduler.root.waiting, scheduler.root.running) == (len(waiting), len(running))


def test_counters_of_those_who_left_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ABSENT", 16)
    scheduler: Scheduler[Item] = Scheduler(max_waiting=5)
    for i in range(200):
        flood(scheduler, Scope(partner=str(i)), 1, cost=i % 7)
        serve(scheduler, 1)
    assert len(scheduler.root.children) <= 17


@given(st.lists(SCOPES, max_size=12), SCOPES)
def test_preemption_takes_the_last_row_of_a_party_with_two_more(running: list[Scope], newcomer: Scope) -> None:
    index = row_to_preempt(newcomer, running)
    levels = [lambda s: (s.partner,), lambda s: (s.partner, s.channel), lambda s: (s.partner, s.channel, s.user)]
    owed = []
    for name in levels:
        parties = Counter(map(name, running))
        mine = name(newcomer)
        siblings = [party for party in parties if party[:-1] == mine[:-1]]
        owed.append([party for party in siblings if parties[party] >= parties[mine] + 2])
    if index is None:
        assert not any(owed)
    else:
        party = running[index]
        level = next(i for i, parties in enumerate(owed) if parties)
        assert levels[level](party) in owed[level]
        assert all(levels[level](later) != levels[level](party) for later in running[index + 1 :])


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 4))
def test_preemption_stops_at_shares_by_weight(rows: int, mine: int, theirs: int) -> None:
    """A flood that holds all rows gives them up one by one, and never gets one back that way."""
    running = [Scope("flood", weight=theirs)] * rows
    newcomer = Scope("calm", weight=mine)
    while (index := row_to_preempt(newcomer, running)) is not None:
        del running[index]
        running.append(newcomer)
        assert row_to_preempt(Scope("flood", weight=theirs), running) is None
    fair = rows * mine / (mine + theirs)
    assert abs(sum(scope.partner == "calm" for scope in running) - fair) <= 1


def test_a_partner_with_one_row_does_not_hide_one_with_many() -> None:
    flood, light = Scope("flood"), Scope("light", weight=0.1)
    for running in ([flood] * 7 + [light], [light] + [flood] * 7):
        index = row_to_preempt(Scope("calm"), running)
        assert index is not None
        assert running[index] == flood


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.01, 0.1, 0.5, 1.0, 2.0, 10.0]), min_size=1),
    st.lists(st.sampled_from("abcd"), max_size=12),
    st.sampled_from([0.1, 1.0, 3.0]),
)
def test_preemption_compares_rows_by_weight(weights: dict[str, float], rows: list[str], weight: float) -> None:
    counts = Counter(name for name in rows if name in weights)
    running = [Scope(name, weight=weights[name]) for name in rows if name in weights]
    index = row_to_preempt(Scope("newcomer", weight=weight), running)
    owing = [name for name, count in counts.items() if (count - 1) / weights[name] >= 1 / weight]
    assert (index is not None) is bool(owing)
    assert index is None or running[index].partner in owing
