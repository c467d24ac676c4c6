"""A conversation's next turn computes only its new tokens, gives the same text, and shares nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools

import pytest
import torch

from core.engine.local import LocalEngine
from core.engine.protocol import Request, Scope
from core.engine.runtime.prefix_cache import CachedPrefix, PrefixCache
from core.errors import EngineError
from core.model.base import BaseModel
from core.types import AdapterRef, Message, Role
from tests.support.engine_dialogue import Heard, ask, hear, is_blank, running

SCOPE = Scope("p", "c", "u", "v")


def turn(said: list[str], *, adapter: AdapterRef | None = None, scope: Scope = SCOPE) -> Request:
    """The request of a turn: user and model in turns, the user last."""
    roles = (Role.USER, Role.ASSISTANT)
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(said))
    return dataclasses.replace(ask(said[-1], adapter=adapter, scope=scope, max_tokens=12), messages=messages)


async def say(engine: LocalEngine, said: list[str], **options: object) -> Heard:
    return await hear(engine.submit(turn(said, **options)))  # type: ignore[arg-type]


def reused(heard: Heard) -> int:
    assert heard.started is not None
    return heard.started.reused_tokens


async def test_a_conversation_continues_from_its_prefix_with_the_same_text(
    base: BaseModel, adapters: list[AdapterRef]
) -> None:
    for adapter in (None, adapters[0]):
        texts = {}
        for mib in (64, 0):
            said, heard = [], []
            async with running(base, reuse_mib=mib) as engine:
                for number in range(4):
                    said.append(f"question {number}")
                    heard.append(await say(engine, said, adapter=adapter))
                    said.append("an answer that is not what the model said" if number == 2 else heard[-1].text)
                texts[mib] = [one.text for one in heard]
                assert is_blank(engine.thread.runner.cache)
            started = [one.started for one in heard if one.started is not None]
            if mib:
                assert reused(heard[0]) == 0
                assert all(one.reused_tokens >= before.prompt_tokens for before, one in itertools.pairwise(started))
            else:
                assert [one.reused_tokens for one in started] == [0] * 4
        assert texts[64] == texts[0]


async def test_a_prefix_is_reused_by_its_own_conversation_only(base: BaseModel, adapters: list[AdapterRef]) -> None:
    """Another adapter, channel or conversation begins from nothing; what is forgotten is gone."""
    said = ["tell me", "something", "and then"]
    async with running(base) as engine:
        await say(engine, said[:1])
        assert reused(await say(engine, said)) > 0
        for other in (Scope("p", "d", "u", "v"), Scope("p", "c", "u", "w"), Scope("p", "c", "u")):
            assert reused(await say(engine, said, scope=other)) == 0
        assert reused(await say(engine, said, scope=Scope("p", "c", "u"))) == 0  # no conversation, nothing kept
        assert reused(await say(engine, said, adapter=adapters[0])) == 0
        assert reused(await say(engine, said)) == 0  # the other adapter has taken its place
        assert reused(await say(engine, said)) > 0
        await engine.forget("c", "v")
        assert reused(await say(engine, said)) == 0
        await engine.forget("d")
        assert reused(await say(engine, said, scope=Scope("p", "d", "u", "v"))) == 0
        assert reused(await say(engine, said, scope=Scope("p", "c", "u", "w"))) > 0


async def test_answers_are_the_adapters_own_whatever_prefix_is_cached(
    base: BaseModel, adapters: list[AdapterRef]
) -> None:
    """One conversation whose adapter changes at every turn, among crowds, against an engine that keeps nothing."""
    refs: list[AdapterRef | None] = [None, *adapters, None, adapters[2], adapters[2], adapters[0]]
    said = [["same words", "same answer", f"turn {i // 2}"] for i in range(len(refs))]
    async with running(base, reuse_mib=0) as engine:
        expected = [(await say(engine, words, adapter=ref)).text for words, ref in zip(said, refs, strict=True)]
    async with running(base, max_rows=3) as engine:
        for _ in range(2):
            requests = [turn(words, adapter=ref) for words, ref in zip(said, refs, strict=True)]
            heard = await asyncio.gather(*(hear(engine.submit(request)) for request in requests))
            assert [one.text for one in heard] == expected
        for _ in range(2):  # the crowd's last to end may have been another adapter's
            alone = await hear(engine.submit(turn(said[-1], adapter=refs[-1])))
            assert alone.text == expected[-1]
        assert reused(alone) > 0


async def test_a_stopped_answer_stores_no_prefix_of_a_forgotten_conversation(base: BaseModel) -> None:
    endless = dataclasses.replace(base, eos_ids=frozenset())
    async with running(endless) as engine:
        running_one = engine.submit(dataclasses.replace(ask("a", max_tokens=400), scope=SCOPE))
        await anext(running_one)
        await engine.forget("c", "v")
        await hear(running_one)
        assert len(engine.thread.rows.prefixes) == 0


def kept(size: int, adapter: str = "") -> CachedPrefix:
    return CachedPrefix(adapter, (1, 2, 3), [torch.ones(size, dtype=torch.uint8)])


def test_memory_is_bounded_and_the_least_recently_used_go_first() -> None:
    store = PrefixCache(100)
    scopes = [Scope(channel="c", conversation=str(i)) for i in range(4)]
    entries = [kept(40) for _ in scopes]
    for scope, entry in zip(scopes[:2], entries, strict=False):
        store.put(scope, entry)
    assert store.find(scopes[0], "", (1, 2, 9)) == (entries[0], 2)
    store.put(scopes[2], entries[2])
    assert store.find(scopes[1], "", (1, 2, 9)) is None
    assert not entries[1].tensors[0].any()  # wiped, not just let go
    assert (len(store), store.size) == (2, 80)
    store.put(scopes[2], kept(10))
    assert (len(store), store.size) == (2, 50)
    assert not store.accepts(scopes[3], 101)
    assert not store.accepts(Scope(channel="c"), 1)
    store.forget("c", "")
    assert (len(store), store.size) == (0, 0)


def test_the_last_token_of_a_prompt_is_always_run() -> None:
    store = PrefixCache(100)
    store.put(SCOPE, kept(3))
    found = store.find(SCOPE, "", (1, 2, 3))
    assert found is not None
    assert found[1] == 2
    assert store.find(SCOPE, "", (9, 2, 3)) is None
    assert store.find(SCOPE, "other", (1, 2, 3)) is None
    assert len(store) == 0


async def test_an_error_while_a_row_is_admitted_moves_no_other_row(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(base) as engine:
        good = await hear(engine.submit(ask("one", max_tokens=8)))
        find = engine.thread.rows.prefixes.find
        with monkeypatch.context() as patch:
            patch.setattr(engine.thread.rows.prefixes, "find", lambda *args: find(*args[:1]))  # type: ignore[call-arg]
            with pytest.raises(EngineError):
                await hear(engine.submit(ask("two", max_tokens=8)))
        assert engine.thread.runner.cache.rows == 0
        assert (await hear(engine.submit(ask("one", max_tokens=8)))).text == good.text
