"""The scripted engine follows the protocol."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from core.engine.protocol import Delta, Event, Finished, FinishReason, Generation, Request, Scope, Started
from core.engine.scripted import ScriptedEngine
from core.errors import BadConfig, EngineError, Overloaded, PromptTooLong
from core.types import Message, Role, Sampling, TokenUsage


def request(text: str = "hi", *, deadline_s: float = 60.0, max_prompt_tokens: int = 0, **sampling: object) -> Request:
    return Request(
        id=text,
        messages=(Message(Role.USER, text),),
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        scope=Scope(channel="c", conversation=text),
        deadline_s=deadline_s,
        max_prompt_tokens=max_prompt_tokens,
    )


async def said(engine: ScriptedEngine, asked: Request) -> tuple[str, Finished]:
    events: list[Event] = [event async for event in engine.submit(asked)]
    last = events[-1]
    assert isinstance(last, Finished)
    return "".join(event.text for event in events if isinstance(event, Delta)), last


async def test_answers_word_by_word_from_the_table_and_echoes_otherwise() -> None:
    async with ScriptedEngine({"hi": "hello  there\n"}) as engine:
        events = [event async for event in engine.submit(request())]
        assert events[0] == Started(1)
        assert events[1:3] == [Delta("hello"), Delta("  there")]
        assert "".join(e.text for e in events if isinstance(e, Delta)) == "hello  there\n"
        assert await said(engine, request("what now")) == (
            "You said: what now",
            Finished(FinishReason.END, TokenUsage(2, 4)),
        )
        assert [r.id for r in engine.requests] == ["hi", "what now"]


async def test_stop_strings_and_max_tokens_end_an_answer() -> None:
    async with ScriptedEngine(lambda _: "one two three four") as engine:
        assert await said(engine, request(stop=("o th",))) == ("one tw", Finished(FinishReason.STOP, TokenUsage(1, 3)))
        assert await said(engine, request(max_tokens=2)) == ("one two", Finished(FinishReason.LENGTH, TokenUsage(1, 2)))


async def test_cancel_and_deadline_and_forget_end_with_usage() -> None:
    async with ScriptedEngine(lambda _: "word " * 1000, delay_s=0.01) as engine:
        running = engine.submit(request("a"))
        reasons = []
        async for event in running:
            if isinstance(event, Delta):
                running.cancel()
            if isinstance(event, Finished):
                reasons.append(event.reason)
                assert event.usage.completion_tokens >= 1
        reasons.append((await said(engine, request("b", deadline_s=0.05)))[1].reason)
        forgotten = engine.submit(request("d"))
        await engine.forget("c", "d")
        reasons += [event.reason async for event in forgotten if isinstance(event, Finished)]
        assert reasons == [FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.CANCELLED]


async def test_errors_are_raised_out_of_the_iteration() -> None:
    async with ScriptedEngine({"hi": EngineError(detail="injected")}, context=3, max_waiting=1) as engine:
        with pytest.raises(EngineError, match="injected"):
            await said(engine, request())
        with pytest.raises(PromptTooLong):
            await said(engine, request("a b c d"))
        kept = engine.submit(request("x"))
        with pytest.raises(Overloaded):
            await said(engine, request("y"))
        assert [type(event) async for event in kept][-1] is Finished
        await engine.drain(1.0)
        with pytest.raises(Overloaded):
            await said(engine, request("z"))


async def test_oldest_exchanges_are_dropped_to_fit() -> None:
    messages = tuple(Message(role, "a b") for role in (Role.USER, Role.ASSISTANT, Role.USER))
    async with ScriptedEngine(context=3) as engine:
        events = [event async for event in engine.submit(Request("1", messages))]
        assert events[0] == Started(2, dropped=2)


async def test_leaving_the_engine_cancels_what_an_error_left_behind() -> None:
    left: list[Generation] = []

    async def broken() -> None:
        async with ScriptedEngine(delay_s=60) as engine:
            left.append(engine.submit(request()))
            await asyncio.sleep(0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await broken()
    assert [event.reason async for event in left[0] if isinstance(event, Finished)] == [FinishReason.CANCELLED]


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.toml", 'delay_s = 0\n[answers]\nhi = "yo"\n'), ("t.json", '{"hi": "yo"}')],
)
async def test_a_table_is_read_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    async with ScriptedEngine.from_file(tmp_path / name) as engine:
        assert (await said(engine, request()))[0] == "yo"


@pytest.mark.parametrize(("name", "text"), [("a.toml", "= ="), ("b.json", "[1]"), ("c.json", '{"hi": 3}')])
def test_a_broken_table_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadConfig):
        ScriptedEngine.from_file(tmp_path / name)
