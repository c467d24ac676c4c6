"""The engine protocol (core/engine/protocol.py), tested on every engine."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from pathlib import Path

import pytest

from core.engine.protocol import Delta, Event, Finished, FinishReason, Scope, Started
from core.errors import AdapterUnusable, BadInput, Overloaded, PromptTooLong
from core.model.base import BaseModel
from core.types import AdapterRef, Message, Role
from tests.support.engine_contract import Subject, eventually, local, over_fake, scripted
from tests.support.engine_dialogue import ask, hear


@pytest.fixture(params=["local", "scripted", "remote", pytest.param("vllm", marks=pytest.mark.drill)])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "scripted":
        return scripted()
    if request.param == "vllm":
        found: Subject = request.getfixturevalue("vllm")
        return found
    base: BaseModel = request.getfixturevalue("base")
    adapters: list[AdapterRef] = request.getfixturevalue("adapters")
    return local(base, adapters) if request.param == "local" else over_fake(base, adapters)


async def test_events_come_in_order_with_usage(subject: Subject) -> None:
    async with subject.open() as engine:
        events: list[Event] = [event async for event in engine.submit(subject.long(max_tokens=12))]
        started, last = events[0], events[-1]
        assert isinstance(started, Started)
        assert isinstance(last, Finished)
        assert all(isinstance(event, Delta) and event.text for event in events[1:-1])
        assert last.reason is FinishReason.LENGTH
        assert started.prompt_tokens > 0
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (started.prompt_tokens, 12)
        assert engine.stats().generated_tokens == 12
        assert [event async for event in engine.submit(ask("and again", max_tokens=1))][-1]


async def test_the_same_request_has_the_same_answer_alone_and_among_others(subject: Subject) -> None:
    async with subject.open() as engine:
        asked = [ask(f"{i} asks", temperature=0.8 * (i % 2), seed=7) for i in range(4)]
        alone = [(await hear(engine.submit(one))).text for one in asked]
        together = await asyncio.gather(*(hear(engine.submit(one)) for one in asked))
        assert [heard.text for heard in together] == alone
        assert len(set(alone)) == 4


async def test_another_seed_draws_another_answer(subject: Subject) -> None:
    if not subject.adapters:
        pytest.skip("its answers stand in a table")
    async with subject.open() as engine:
        drawn = [(await hear(engine.submit(ask("hi", temperature=1.0, seed=seed)))).text for seed in (1, 2, 3)]
        assert len(set(drawn)) > 1


async def test_each_adapter_gives_its_own_answer(subject: Subject) -> None:
    if not subject.adapters:
        pytest.skip("it takes adapters unseen")
    async with subject.open() as engine:
        refs = [None, *subject.adapters]
        requests = [ask("hello", adapter=ref, deadline_s=600) for ref in refs]  # which no deadline may cut
        alone = [(await hear(engine.submit(one))).text for one in requests]
        together = await asyncio.gather(*(hear(engine.submit(one)) for one in requests * 2))
        assert [heard.text for heard in together] == alone * 2
        assert len(set(alone)) == len(refs)
        assert engine.stats().resident_adapters == len(subject.adapters)


async def test_an_unusable_adapter_fails_its_own_request_alone(subject: Subject, tmp_path: Path) -> None:
    if not subject.adapters:
        pytest.skip("it takes adapters unseen")
    missing = AdapterRef("0" * 64, tmp_path / "nowhere", "gone@1")
    damaged = AdapterRef("1" * 64, tmp_path / "damaged", "damaged@1")
    shutil.copytree(subject.adapters[0].folder, damaged.folder)
    (damaged.folder / "adapter_config.json").write_text("{")
    async with subject.open() as engine:
        good = engine.submit(ask("x", adapter=subject.adapters[0]))
        for ref in (missing, damaged):
            with pytest.raises(AdapterUnusable, match=ref.label):
                await hear(engine.submit(ask("x", adapter=ref)))
        assert (await hear(good)).finished is not None


async def test_a_stop_string_ends_the_answer_before_it(subject: Subject) -> None:
    async with subject.open() as engine:
        whole = (await hear(engine.submit(subject.long(max_tokens=40)))).text
        stop = whole[len(whole) // 2 :][:3]
        heard = await hear(engine.submit(subject.long(max_tokens=40, stop=("never said", stop))))
        assert heard.text == whole[: whole.index(stop)]
        assert heard.finished is not None
        assert heard.finished.reason is FinishReason.STOP
        assert 1 <= heard.finished.usage.completion_tokens < 40


async def test_characters_are_whole(subject: Subject) -> None:
    if subject.name == "local":
        pytest.skip(
            "a random model's bytes make no characters; tests/core/engine/scheduling/test_detokenizer.py tries it"
        )
    async with subject.open() as engine:
        heard = await hear(engine.submit(subject.long(max_tokens=60)))
        assert heard.text
        assert "\ufffd" not in heard.text


async def test_cancel_ends_with_usage_and_frees_the_row(subject: Subject) -> None:
    async with subject.open(max_rows=1) as engine:
        generation, next_one = engine.submit(subject.long()), engine.submit(ask("next", max_tokens=4))
        reason = None
        async for event in generation:
            if isinstance(event, Delta):
                generation.cancel()
            if isinstance(event, Finished):
                reason = event.reason
                assert 1 <= event.usage.completion_tokens < 300
        assert reason is FinishReason.CANCELLED
        assert (await hear(next_one)).finished is not None
        generation.cancel()  # too late, and no matter
        assert engine.stats().running == 0


async def test_a_cancelled_request_is_dropped_by_the_server_too(subject: Subject) -> None:
    if subject.running_there is None:
        pytest.skip("no server")
    running_there = subject.running_there
    async with subject.open(max_rows=4) as engine:
        generations = [engine.submit(subject.long(scope=Scope(user=str(i)))) for i in range(4)]
        for generation in generations:
            async for event in generation:
                if isinstance(event, Delta):
                    break

        async def now(count: int) -> bool:
            return await running_there() == count

        await eventually(lambda: now(4))
        for left in (3, 2, 1, 0):
            generations[left].cancel()
            await eventually(lambda left=left: now(left), limit_s=5.0)  # type: ignore[misc]


async def test_cancel_while_waiting(subject: Subject) -> None:
    async with subject.open(max_rows=1) as engine:
        first, second = engine.submit(subject.long()), engine.submit(subject.long())
        second.cancel()
        heard = await hear(second)
        assert heard.finished == Finished(FinishReason.CANCELLED, dataclasses.replace(heard.finished.usage))  # type: ignore[union-attr]
        assert heard.finished.usage.completion_tokens == 0
        first.cancel()
        assert (await hear(first)).finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]


async def test_a_deadline_keeps_what_exists(subject: Subject) -> None:
    async with subject.open(max_rows=1) as engine:
        late, waits = engine.submit(subject.long(deadline_s=0.3)), engine.submit(subject.long(deadline_s=0.01))
        heard = await hear(late)
        assert heard.finished is not None
        assert heard.finished.reason in (FinishReason.DEADLINE, FinishReason.LENGTH)
        assert bool(heard.text) <= (heard.finished.usage.completion_tokens >= 1)
        assert (await hear(waits)).finished.reason is FinishReason.DEADLINE  # type: ignore[union-attr]
        gone = await hear(engine.submit(subject.long(deadline_s=0.0)))
        assert gone.finished is not None
        assert gone.finished.reason is FinishReason.DEADLINE


async def test_the_oldest_turns_are_dropped_to_fit_and_the_last_alone_must(subject: Subject) -> None:
    turns = [Message(role, f"turn {i}") for i in range(3) for role in (Role.USER, Role.ASSISTANT)]
    messages = (Message(Role.SYSTEM, "be brief"), *turns, Message(Role.USER, "the last"))
    async with subject.open() as engine:
        request = dataclasses.replace(ask("x", max_tokens=2), messages=messages)
        whole = (await hear(engine.submit(request))).started
        assert whole is not None
        assert whole.dropped == 0
        less = (
            await hear(engine.submit(dataclasses.replace(request, max_prompt_tokens=whole.prompt_tokens - 1)))
        ).started
        assert less is not None
        assert less.dropped == 2
        assert less.prompt_tokens < whole.prompt_tokens
        with pytest.raises(PromptTooLong) as caught:
            await hear(engine.submit(dataclasses.replace(request, max_prompt_tokens=3)))
        assert caught.value.fields["limit"] == 3


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"max_tokens": 0}, {"min_p": 2.0}]
)
async def test_impossible_parameters_are_bad_input(subject: Subject, wrong: dict[str, float]) -> None:
    async with subject.open() as engine:
        with pytest.raises(BadInput):
            await hear(engine.submit(ask("x", **wrong)))
        assert (await hear(engine.submit(ask("x", max_tokens=2)))).finished is not None


async def test_a_full_queue_refuses_with_an_estimate(subject: Subject) -> None:
    async with subject.open(max_rows=1, max_waiting=2) as engine:
        flood = [engine.submit(subject.long(max_tokens=8, scope=Scope(user="u"))) for _ in range(12)]
        outcomes = await asyncio.gather(*map(hear, flood), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        assert refused
        assert all(error.retry_after_s >= 1 for error in refused)
        assert 1 <= sum(not isinstance(outcome, BaseException) for outcome in outcomes) <= 5


async def test_forget_ends_a_conversation_and_leaves_the_others(subject: Subject) -> None:
    async with subject.open() as engine:
        forgotten = [engine.submit(subject.long(scope=Scope(channel="c", conversation="a")))]
        kept = engine.submit(subject.long(max_tokens=20, scope=Scope(channel="c", conversation="b")))
        await engine.forget("c", "a")
        heard = await asyncio.gather(*map(hear, [*forgotten, kept]))
        assert [one.finished and one.finished.reason for one in heard] == [FinishReason.CANCELLED, FinishReason.LENGTH]
        running = engine.submit(subject.long(scope=Scope(channel="c", conversation="b")))
        await engine.forget("c")
        assert (await hear(running)).finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]


async def test_drain_finishes_what_runs_and_refuses_the_rest(subject: Subject) -> None:
    async with subject.open() as engine:
        short, long = engine.submit(subject.long(max_tokens=4)), engine.submit(subject.long())
        assert await anext(aiter(short))
        drained = asyncio.create_task(engine.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await hear(engine.submit(ask("late")))
        await drained
        assert (await hear(short)).finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]
        assert (await hear(long)).finished.reason in (FinishReason.CANCELLED, FinishReason.LENGTH)  # type: ignore[union-attr]
        assert engine.stats().running == 0
