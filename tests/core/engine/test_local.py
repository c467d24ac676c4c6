"""The local engine: joining and leaving, cancelling, stopping, deadlines, bounds, failures, forgetting."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config.sections import EngineSettings, ModelSettings
from core.engine.local import LocalEngine
from core.engine.lora import adapter_files
from core.engine.lora.adapter_files import AdapterTarget, AdapterWeights
from core.engine.protocol import Delta, Finished, FinishReason, Request, Scope, Started
from core.engine.runtime.kv_cache import IDLE_BYTES, SlotCache
from core.engine.scheduling.admission import LOOKAHEAD
from core.engine.scheduling.request_state import RequestState
from core.errors import EngineError, OutOfMemory, Overloaded, PromptTooLong
from core.model.base import BaseModel
from core.types import AdapterRef, TokenUsage
from tests.support.engine_dialogue import ask, hear, is_blank, running
from tests.support.engine_steps import Steps
from tests.support.waiting import DEADLINE_S

LONG = {"max_tokens": 300}


class Gate:
    """Lets the model thread take steps only while open; counts the passes."""

    def __init__(self, engine: LocalEngine) -> None:
        self.open = threading.Event()
        self.open.set()
        self.passes = 0
        forward = engine.thread.runner.run

        def gated(*args: Any) -> Any:
            assert self.open.wait(30)
            self.passes += 1
            return forward(*args)

        engine.thread.runner.run = gated  # type: ignore[method-assign]


@pytest.fixture
def endless(base: BaseModel) -> BaseModel:
    """The base model without an end token: answers have the length that the test asks for."""
    return dataclasses.replace(base, eos_ids=frozenset())


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - the model thread tells nobody
            await asyncio.sleep(0.005)


async def test_events_come_in_order_with_usage(endless: BaseModel) -> None:
    async with running(endless) as engine:
        events = [event async for event in engine.submit(ask("hello", max_tokens=10))]
        assert isinstance(events[0], Started)
        assert all(isinstance(event, Delta) for event in events[1:-1])
        last = events[-1]
        assert isinstance(last, Finished)
        assert last.reason is FinishReason.LENGTH
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (events[0].prompt_tokens, 10)
        assert engine.stats().generated_tokens == 10
        assert engine.info.fingerprint == endless.fingerprint


async def test_the_end_token_ends_the_answer_and_is_not_shown(base: BaseModel) -> None:
    async with running(base) as engine:
        plain = await hear(engine.submit(ask("q", max_tokens=6)))
    first = base.tokenizer.encode(plain.text[3:4], add_special_tokens=False)[0]
    async with running(dataclasses.replace(base, eos_ids=frozenset({first}))) as engine:
        ended = await hear(engine.submit(ask("q", max_tokens=6)))
    assert ended.finished is not None
    assert ended.finished.reason is FinishReason.END
    assert plain.text.startswith(ended.text)
    assert len(ended.text) <= 3


async def test_requests_join_and_leave_between_steps(endless: BaseModel) -> None:
    """A short request that comes later ends while a long one goes on, in the same batch."""
    async with running(endless, max_rows=2) as engine:
        long = engine.submit(ask("long", **LONG))
        assert isinstance(await anext(long), Started)
        short = await hear(engine.submit(ask("short", max_tokens=4)))
        assert short.finished is not None
        assert engine.stats().running == 1
        long.cancel()
        heard = await hear(long)
        assert heard.finished is not None
        assert heard.finished.reason is FinishReason.CANCELLED


async def test_eight_rows_take_one_pass_per_token_together(endless: BaseModel) -> None:
    async with running(endless) as engine:
        gate = Gate(engine)
        await asyncio.gather(*(hear(engine.submit(ask(f"{i}", max_tokens=20))) for i in range(8)))
        assert gate.passes < 8 + 20 + 8  # prefills, joint steps, some slack for joining


async def test_cancel_in_decode_frees_the_row_and_gives_usage(endless: BaseModel) -> None:
    async with running(endless) as engine:
        generation = engine.submit(ask("x", **LONG))
        tokens = 0
        async for event in generation:
            if isinstance(event, Delta):
                generation.cancel()
            if isinstance(event, Finished):
                assert event.reason is FinishReason.CANCELLED
                tokens = event.usage.completion_tokens
        assert 1 <= tokens < 300
        assert engine.stats().running == 0
        assert is_blank(engine.thread.runner.cache)


def test_cancel_in_prefill_frees_the_row_within_a_step(endless: BaseModel) -> None:
    steps = Steps(endless)
    steps.thread.chunk = 16
    steps.submit("200:long", Scope("p"))
    for _ in range(3):
        steps.step()
    (state,) = steps.thread.rows.states
    assert state.computed == 3 * 16
    steps.thread.cancel(state)
    steps.step()
    assert steps.over["200:long"] == Finished(FinishReason.CANCELLED, TokenUsage(200, 0, 0))
    assert not steps.thread.rows.states
    assert is_blank(steps.thread.runner.cache)


async def test_cancel_while_waiting(endless: BaseModel) -> None:
    async with running(endless, max_rows=1) as engine:
        gate = Gate(engine)
        gate.open.clear()
        running_one = engine.submit(ask("a", max_tokens=5))
        waiting = [engine.submit(ask(f"w{i}", max_tokens=5)) for i in range(6)]
        for generation in waiting:
            generation.cancel()
        gate.open.set()
        assert {(await hear(g)).finished.reason for g in waiting} == {FinishReason.CANCELLED}  # type: ignore[union-attr]
        assert (await hear(running_one)).finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]
        assert engine.stats().waiting == 0


async def test_a_stop_string_ends_the_answer_before_it(endless: BaseModel) -> None:
    async with running(endless) as engine:
        plain = (await hear(engine.submit(ask("x")))).text
        stop = plain[8:12]
        heard = await hear(engine.submit(ask("x", stop=("never there", stop))))
        assert heard.finished is not None
        assert heard.finished.reason is FinishReason.STOP
        assert heard.text == plain[: plain.index(stop)]


async def test_characters_are_never_split(endless: BaseModel) -> None:
    async with running(endless) as engine:
        for seed in range(5):
            heard = await hear(engine.submit(ask("é", temperature=1.5, seed=seed, max_tokens=60)))
            assert not any(delta.endswith("\ufffd") for delta in heard.deltas)


async def test_a_deadline_keeps_what_exists(endless: BaseModel) -> None:
    async with running(endless) as engine:
        late = await hear(engine.submit(ask("x", deadline_s=0.0)))
        assert late.finished is not None
        assert late.finished.reason is FinishReason.DEADLINE
        generation = engine.submit(ask("x", max_tokens=400))
        gate = Gate(engine)
        heard = asyncio.create_task(hear(generation))
        await eventually(lambda: engine.stats().generated_tokens > 3)
        gate.open.clear()
        engine.thread.rows.states[0].deadline = time.monotonic()
        gate.open.set()
        finished = (await heard).finished
        assert finished is not None
        assert finished.reason is FinishReason.DEADLINE
        assert finished.usage.completion_tokens > 3


async def test_a_deadline_ends_a_waiting_request_while_none_runs(endless: BaseModel) -> None:
    async with running(endless) as engine:
        stuck = threading.Event()
        engine.thread.queue._prepare = lambda state: stuck.wait(30)  # type: ignore[assignment, return-value]
        heard = await hear(engine.submit(ask("x", deadline_s=0.1)))
        stuck.set()
        assert heard.finished is not None
        assert heard.finished.reason is FinishReason.DEADLINE


async def test_slow_adapter_files_delay_no_other_requests(
    endless: BaseModel, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    stalled, load = threading.Event(), adapter_files.load_adapter

    def slow(ref: AdapterRef, base: AdapterTarget) -> AdapterWeights:
        assert ref is adapters[2] or stalled.wait(60)
        return load(ref, base)

    monkeypatch.setattr(adapter_files, "load_adapter", slow)
    rows = 4
    async with running(endless, max_rows=rows) as engine:
        slow_ones = range(rows + LOOKAHEAD)  # as many as are prepared while nobody waits for a file
        waiting = [engine.submit(ask(f"{i}", adapter=adapters[i % 2], scope=Scope("slow"))) for i in slow_ones]
        late = engine.submit(ask("late", adapter=adapters[0], scope=Scope("slow"), deadline_s=0.2))
        assert (await hear(late)).finished.reason is FinishReason.DEADLINE  # type: ignore[union-attr]
        for adapter in (None, adapters[2]):
            other = await hear(engine.submit(ask("x", adapter=adapter, scope=Scope("other"), deadline_s=30)))
            assert other.finished is not None
            assert other.finished.reason is FinishReason.LENGTH
        waiting[0].cancel()
        assert (await hear(waiting[0])).finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
        stalled.set()
        for one in waiting[1:]:
            assert (await hear(one)).finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]
        assert engine.stats().waiting == 0


async def test_an_adapter_without_a_thread_to_read_it_can_be_read_later(
    endless: BaseModel, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "adapter":
            raise RuntimeError("can't start new thread")
        start(thread)

    async with running(endless) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            with pytest.raises(EngineError, match="can't start new thread"):
                await hear(engine.submit(ask("x", adapter=adapters[0])))
        assert (await hear(engine.submit(ask("x", adapter=adapters[0])))).finished is not None


async def test_without_a_thread_for_its_prompt_a_request_fails_alone(
    endless: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(work: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    async with running(endless) as engine:
        alone = await hear(engine.submit(ask("good", **LONG)))
        good = engine.submit(ask("good", **LONG))
        await anext(good)
        with monkeypatch.context() as patch:
            patch.setattr(engine.thread.queue, "_spawn", none_left)
            with pytest.raises(EngineError, match="can't start new thread"):
                await hear(engine.submit(ask("x")))
        assert (await hear(good)).text == alone.text
        assert (await hear(engine.submit(ask("x")))).finished is not None
        assert engine.stats().waiting == 0


async def test_a_full_queue_refuses_with_an_estimate_but_lets_another_partner_in(endless: BaseModel) -> None:
    async with running(endless, max_rows=1, max_waiting=4) as engine:
        gate = Gate(engine)
        gate.open.clear()
        flood = [engine.submit(ask(f"f{i}", scope=Scope(partner="flood"), max_tokens=2)) for i in range(16)]
        calm = engine.submit(ask("calm", scope=Scope(partner="calm"), max_tokens=2))
        gate.open.set()
        outcomes = await asyncio.gather(*map(hear, flood), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        assert refused
        assert len(refused) < 16
        assert all(error.retry_after_s >= 1 for error in refused)
        assert (await hear(calm)).finished is not None


async def test_a_flood_of_one_partner_does_not_delay_another(endless: BaseModel) -> None:
    async with running(endless, max_rows=1) as engine:
        order: list[str] = []

        async def note(name: str) -> None:
            await hear(engine.submit(ask(name, scope=Scope(partner=name[0]), max_tokens=4)))
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for i in range(12):
                group.create_task(note(f"f{i}"))
            await eventually(lambda: len(order) >= 1)
            group.create_task(note("calm"))
        assert order.index("calm") <= 1 + 2 + 3  # one runs, two are prepared ahead, then its turn


async def test_context_is_never_exceeded(endless: BaseModel) -> None:
    async with running(endless, max_context=64) as engine:
        heard = await hear(engine.submit(ask("a", max_tokens=1000)))
        assert heard.finished is not None
        assert heard.finished.reason is FinishReason.LENGTH
        assert heard.finished.usage.prompt_tokens + heard.finished.usage.completion_tokens == 64
        with pytest.raises(PromptTooLong) as caught:
            await hear(engine.submit(ask("a" * 100, max_tokens=10)))
        assert caught.value.fields["limit"] == 54
        with pytest.raises(PromptTooLong):
            await hear(engine.submit(ask("a" * 10, max_prompt_tokens=5)))


async def test_a_pass_that_fails_for_one_row_ends_that_row_alone(endless: BaseModel) -> None:
    async with running(endless) as engine:
        alone = await hear(engine.submit(ask("good", max_tokens=30)))
        forward = engine.thread.runner.run

        def poisoned(first: int, parts: Any, slots: Any) -> Any:
            rows = engine.thread.rows.states[first : first + len(parts)]
            if any(state.request.id == "bad" and len(state.answer) > 5 for state in rows):
                raise ValueError("poisoned")
            return forward(first, parts, slots)

        engine.thread.runner.run = poisoned  # type: ignore[method-assign]
        bad, good = engine.submit(ask("bad", **LONG)), engine.submit(ask("good", max_tokens=30))
        with pytest.raises(EngineError, match="poisoned"):
            await hear(bad)
        assert (await hear(good)).text == alone.text
        assert is_blank(engine.thread.runner.cache)


def nameless(*_: object) -> str:
    """What a tokenizer may have to say to a token that the model has and it has not."""
    raise TypeError("sequence item 0: expected str instance, NoneType found")


@pytest.mark.parametrize("method", ["push", "flush"])
async def test_a_token_without_a_text_is_an_error_of_its_row_alone(endless: BaseModel, method: str) -> None:
    """Whether it shows at the token or only with what is held back to the end."""
    async with running(endless) as engine:
        alone, job_of = await hear(engine.submit(ask("good", max_tokens=40))), engine._new_state

        def made(request: Request) -> RequestState:
            state = job_of(request)
            if request.id == "bad":
                setattr(state.detokenizer, method, nameless)
            return state

        engine._new_state = made  # type: ignore[method-assign]
        good = engine.submit(ask("good", max_tokens=40))
        await anext(good)
        with pytest.raises(EngineError, match="NoneType"):
            await hear(engine.submit(ask("bad", max_tokens=5)))
        assert (await hear(good)).text == alone.text


async def test_a_failed_step_ends_the_running_requests_only(endless: BaseModel) -> None:
    async with running(endless) as engine:
        before = await hear(engine.submit(ask("x")))
        crashing = [engine.submit(ask(f"{i}", **LONG)) for i in range(3)]
        for generation in crashing:
            await anext(generation)
        accept = engine.thread._accept_logits

        def crash(*args: Any) -> None:
            engine.thread._accept_logits = accept  # type: ignore[method-assign]
            raise RuntimeError("boom")

        engine.thread._accept_logits = crash  # type: ignore[method-assign]
        outcomes = await asyncio.gather(*map(hear, crashing), return_exceptions=True)
        assert all(isinstance(outcome, EngineError) for outcome in outcomes)
        assert (await hear(engine.submit(ask("x")))).text == before.text
        assert engine.stats().running == 0


async def test_after_the_model_thread_ends_all_requests_fail(
    endless: BaseModel,
) -> None:
    async with running(endless, max_rows=1) as engine:
        gate = Gate(engine)
        open_ones = [engine.submit(ask("x", **LONG))]
        await anext(open_ones[0])
        gate.open.clear()
        open_ones += [engine.submit(ask(f"{i}", **LONG)) for i in range(4)]

        def broken() -> bool:
            raise OverflowError("boom")

        engine.thread._wait_for_work = broken  # type: ignore[method-assign]
        gate.open.set()
        async with asyncio.timeout(DEADLINE_S):
            outcomes = await asyncio.gather(*map(hear, open_ones), return_exceptions=True)
            assert all(isinstance(outcome, EngineError) for outcome in outcomes)
            with pytest.raises(EngineError, match="has ended"):
                await hear(engine.submit(ask("x")))
            await engine.forget("c")


def test_a_displaced_request_is_answered_when_the_thread_ends(endless: BaseModel) -> None:
    steps = Steps(endless, max_waiting=4)
    for i in range(4):
        steps.submit(f"5:{i}", Scope("flood"))
    steps.submit("5:calm", Scope("calm"))
    steps.thread._end_all(FinishReason.CANCELLED)
    assert steps.over.keys() == {"5:0", "5:1", "5:2", "5:3", "5:calm"}
    assert isinstance(steps.over["5:3"], Overloaded)


async def test_a_far_deadline_does_not_end_the_model_thread(endless: BaseModel) -> None:
    async with running(endless) as engine:
        stuck, job_of = threading.Event(), engine._new_state
        engine.thread.queue._prepare = lambda state: stuck.wait(30)  # type: ignore[assignment, return-value]
        engine._new_state = lambda request: dataclasses.replace(job_of(request), deadline=math.inf)  # type: ignore[method-assign]
        generation = engine.submit(ask("x"))
        await asyncio.sleep(0.1)
        generation.cancel()
        assert (await hear(generation)).finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
        stuck.set()


async def test_an_answer_that_is_not_finite_is_an_error_of_its_row_alone(
    endless: BaseModel, adapters: list[AdapterRef]
) -> None:
    async with running(endless) as engine:
        alone = await hear(engine.submit(ask("good", adapter=adapters[0])))
        weights = engine._adapters.get(adapters[1]).result()
        for _, b in weights.pairs.values():
            b.mul_(1e30)  # finite, but what it computes is not
        good = engine.submit(ask("good", adapter=adapters[0]))
        with pytest.raises(EngineError, match="not finite"):
            await hear(engine.submit(ask("bad", adapter=adapters[1])))
        assert (await hear(good)).text == alone.text


def bounded(cache: SlotCache, slots: int) -> None:
    """As if there were memory for so many slots and no more."""
    resize = cache._resize

    def no_memory(wished: int, length: int) -> None:
        if wished > slots:
            raise torch.OutOfMemoryError("CUDA out of memory")
        resize(wished, length)

    cache.lazy = False
    cache._resize = no_memory  # type: ignore[method-assign]


async def test_a_request_without_memory_for_its_row_waits_for_another_to_end(endless: BaseModel) -> None:
    async with running(endless, reuse_mib=0) as engine:
        alone = await hear(engine.submit(ask("5")))
        engine.thread.runner.cache.clear()
        bounded(engine.thread.runner.cache, 3)
        heard = await asyncio.gather(*(hear(engine.submit(ask(f"{i}"))) for i in range(6)))
        assert [one.finished.reason for one in heard] == [FinishReason.LENGTH] * 6  # type: ignore[union-attr]
        assert heard[5].text == alone.text
        assert engine.thread.runner.cache.slots == 3  # not only the two that doubling would have found memory for
        assert is_blank(engine.thread.runner.cache)


async def test_a_preempted_answer_waits_for_memory(endless: BaseModel) -> None:
    async with running(endless, max_rows=2, reuse_mib=0) as engine:
        flood = [engine.submit(ask(f"{i}", scope=Scope("flood"), **LONG)) for i in range(2)]
        for generation in flood:
            await anext(generation)
        calm = engine.submit(ask("x", scope=Scope("calm"), max_tokens=40))
        await anext(calm)
        cache = engine.thread.runner.cache
        add_row = cache.add_row

        def no_memory(length: int) -> int:
            if cache.rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return add_row(length)

        cache.add_row = no_memory  # type: ignore[method-assign, assignment]
        for generation in (calm, *flood):
            assert (await hear(generation)).finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]


async def test_a_single_request_without_memory_fails(endless: BaseModel) -> None:
    async with running(endless) as engine:
        bounded(engine.thread.runner.cache, 0)
        for _ in range(2):
            with pytest.raises(OutOfMemory):
                await hear(engine.submit(ask("x")))


@pytest.mark.parametrize("what", ["run", "add_row"])
async def test_prefixes_are_dropped_first_when_memory_is_short(endless: BaseModel, what: str) -> None:
    async with running(endless) as engine:
        alone = await hear(engine.submit(ask("x")))
        thread = engine.thread
        owner: Any = thread.runner if what == "run" else thread.runner.cache
        plain = getattr(owner, what)

        def no_memory(*args: Any) -> Any:
            if len(thread.rows.prefixes):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(*args)

        setattr(owner, what, no_memory)
        assert len(thread.rows.prefixes) == 1
        assert (await hear(engine.submit(ask("x", scope=Scope("q"))))).text == alone.text
        assert len(thread.rows.prefixes) == 0


def test_prefixes_are_dropped_for_a_second_row(endless: BaseModel) -> None:
    steps = Steps(endless)
    steps.submit("5:before", Scope("p", "c", "u", "v"), max_tokens=2)
    steps.until_over("5:before", within=5)
    steps.submit("5:long", Scope("p"), max_tokens=300)
    steps.step()
    rows, add_row = steps.thread.rows, steps.thread.runner.cache.add_row

    def no_memory(length: int) -> int:
        if len(rows.prefixes):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add_row(length)

    steps.thread.runner.cache.add_row = no_memory  # type: ignore[method-assign, assignment]
    assert len(rows.prefixes) == 1
    steps.submit("5:x", Scope("q"), max_tokens=2)
    steps.until_over("5:x", within=steps.now + 5)
    assert len(rows.states) == 1


async def test_forget_ends_and_wipes_a_conversation_and_leaves_the_others(endless: BaseModel) -> None:
    async with running(endless) as engine:
        mine, other = Scope("p", "c", "u", "mine"), Scope("p", "c", "u", "other")
        forgotten, kept = engine.submit(ask("a", scope=mine, **LONG)), engine.submit(ask("b", scope=other, **LONG))
        await anext(forgotten)
        await anext(kept)
        await engine.forget("c", "mine")
        assert engine.stats().running == 1
        assert (await hear(forgotten)).finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
        await engine.forget("c")
        assert is_blank(engine.thread.runner.cache)
        assert (await hear(kept)).finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
        await engine.forget("unknown")


async def test_an_abandoned_forget_does_not_affect_others(endless: BaseModel) -> None:
    async with running(endless) as engine:
        gate = Gate(engine)
        mine, other = (
            engine.submit(ask("a", scope=Scope("p", "c"), **LONG)),
            engine.submit(ask("b", scope=Scope("p", "d"), max_tokens=60)),
        )
        await anext(mine)
        gate.open.clear()
        forgetting = asyncio.create_task(engine.forget("c"))
        await asyncio.sleep(0)
        forgetting.cancel()
        await asyncio.wait([forgetting])
        gate.open.set()
        assert (await hear(mine)).finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
        assert (await hear(other)).finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]


async def test_an_error_while_a_row_ends_loses_no_forget_and_no_failure(endless: BaseModel) -> None:
    async with running(endless, max_rows=1, max_waiting=1) as engine:
        gate, cache = Gate(engine), engine.thread.runner.cache
        mine = engine.submit(ask("a", scope=Scope("p", "c"), **LONG))
        await anext(mine)
        gate.open.clear()
        flood = [engine.submit(ask(f"{i}", scope=Scope("p", "c"))) for i in range(4)]
        wipe = cache.wipe

        def broken(row: int) -> None:
            cache.wipe = wipe  # type: ignore[method-assign]
            raise RuntimeError("boom")

        cache.wipe = broken  # type: ignore[method-assign]
        forgetting = asyncio.create_task(engine.forget("c"))
        await asyncio.sleep(0)
        gate.open.set()
        async with asyncio.timeout(DEADLINE_S):
            await forgetting
            await asyncio.gather(*map(hear, [mine, *flood]), return_exceptions=True)
        assert is_blank(engine.thread.runner.cache)
        assert (await hear(engine.submit(ask("x")))).finished is not None


async def test_a_forget_between_the_end_of_the_thread_and_that_of_the_engine(endless: BaseModel) -> None:
    async with running(endless) as engine:
        engine.thread.stop()
        async with asyncio.timeout(DEADLINE_S):
            await engine.forget("c")


async def test_memory_is_blank_after_an_answer(endless: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(endless) as engine:
        cache = engine.thread.runner.cache
        await asyncio.gather(*(hear(engine.submit(ask(f"{i}" * 20 * i))) for i in range(6)))
        assert cache._tensors()
        assert is_blank(cache)
        assert 0 < cache.held_bytes <= IDLE_BYTES
        monkeypatch.setattr("core.engine.runtime.kv_cache.IDLE_BYTES", cache.held_bytes)
        await hear(engine.submit(ask("x", max_tokens=400)))
        assert not cache._tensors()  # grown memory is given back when idle


async def test_drain_finishes_what_runs_and_refuses_the_rest(endless: BaseModel) -> None:
    async with running(endless) as engine:
        generation = engine.submit(ask("x", max_tokens=8))
        draining = asyncio.create_task(engine.drain(30.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await hear(engine.submit(ask("late")))
        await draining
        assert (await hear(generation)).finished.reason is FinishReason.LENGTH  # type: ignore[union-attr]


async def test_leaving_the_engine_cancels_after_the_drain_and_ends_its_thread(endless: BaseModel) -> None:
    async with running(endless, max_rows=1) as engine:
        generations = [engine.submit(ask(f"{i}", **LONG)) for i in range(4)]
        await engine.drain(0.0)
        reasons = [(await hear(generation)).finished.reason for generation in generations]  # type: ignore[union-attr]
        assert FinishReason.CANCELLED in reasons
    assert not engine.thread._thread.is_alive()
    with pytest.raises(EngineError, match="not running"):
        await hear(engine.submit(ask("x")))


async def test_the_engine_can_be_entered_again(endless: BaseModel) -> None:
    engine = LocalEngine(ModelSettings(), EngineSettings(), Path(), model=endless)
    texts = []
    for _ in range(2):
        async with engine:
            texts.append((await hear(engine.submit(ask("x")))).text)
    assert texts[0] == texts[1]
