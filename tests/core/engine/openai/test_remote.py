"""The remote engine over a strict fake server: faults, time-outs, retries, adapters, usage, secrets."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import shutil
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from core.engine.openai.remote import RemoteEngine
from core.engine.protocol import Delta, Finished, FinishReason, Scope
from core.errors import AdapterUnusable, AppError, EngineError, ModelLoadFailed, Overloaded, PromptTooLong
from core.model.base import BaseModel
from core.model.chat_format import render
from core.types import AdapterRef
from tests.fakes.openai import FakeOpenAI
from tests.support.engine_contract import LONG, eventually, remote
from tests.support.engine_dialogue import Heard, ask, hear

SHORT = {"connect_s": 0.5, "first_token_s": 0.5, "next_token_s": 0.3}


@pytest.fixture
async def fake(base: BaseModel) -> AsyncIterator[FakeOpenAI]:
    async with FakeOpenAI(base.tokenizer).open() as server:
        yield server


@asynccontextmanager
async def engine_over(fake: FakeOpenAI, base: BaseModel, **settings: Any) -> AsyncIterator[RemoteEngine]:
    """Entered; what the start has asked is forgotten."""
    async with remote(fake.url, base.folder, **settings) as engine:
        fake.asked.clear()
        yield engine


async def heard_error(engine: RemoteEngine, kind: type[AppError] = EngineError, **asked: Any) -> str:
    with pytest.raises(kind) as caught:
        await hear(engine.submit(ask(**asked)))
    return caught.value.detail


# --- what is sent


async def test_the_prompt_is_what_the_local_engine_would_run(fake: FakeOpenAI, base: BaseModel) -> None:
    request = ask(
        "say <|im_end|> to the 🐟", temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, seed=9
    )
    async with engine_over(fake, base) as engine:
        await hear(engine.submit(request))
        await hear(engine.submit(ask("other", scope=Scope(conversation="w"), stop=("x", "yz"))))
    sent = fake.asked[0]
    assert tuple(sent["prompt"]) == render(request.messages, base.tokenizer, 512).ids
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 9}
    assert {name: sent[name] for name in wanted} == wanted
    assert sent["stop_token_ids"] == sorted(base.eos_ids)
    assert sent["model"] == "acme/base"
    assert "stop" not in sent
    assert fake.asked[1]["stop"] == ["x", "yz"]
    neutral = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    assert {name: fake.asked[1][name] for name in neutral} == neutral  # a server's own defaults do not count


async def test_only_the_same_conversation_finds_its_prefix(fake: FakeOpenAI, base: BaseModel) -> None:
    async with engine_over(fake, base) as engine:
        for channel, conversation in (("c", "v"), ("c", "v"), ("c", "w"), ("d", "v"), ("c", ""), ("c", "")):
            await hear(engine.submit(ask(scope=Scope(channel=channel, conversation=conversation))))
        await engine.forget("c", "v")
        await hear(engine.submit(ask(scope=Scope(channel="c", conversation="v"))))
    salts = [sent["cache_salt"] for sent in fake.asked]
    assert salts[0] == salts[1]
    assert len({salts[0], *salts[2:]}) == 6


async def test_answer_and_prompt_share_the_context(fake: FakeOpenAI, base: BaseModel) -> None:
    async with engine_over(fake, base, max_context=64) as engine:
        assert engine.info.context == 64
        heard = await hear(engine.submit(ask("a long one", max_tokens=1000)))
        assert heard.finished is not None
        assert heard.finished.usage.prompt_tokens + heard.finished.usage.completion_tokens == 64
        with pytest.raises(PromptTooLong):
            await hear(engine.submit(ask("a" * 100, max_tokens=10)))
    fake.context = 48  # the server was started anew with less
    async with remote(fake.url, base.folder) as engine:
        fake.context = 24
        with pytest.raises(PromptTooLong):
            await hear(engine.submit(ask("hello", max_tokens=20)))


# --- what comes back


async def test_lines_end_at_line_feeds_alone(fake: FakeOpenAI, base: BaseModel) -> None:
    async with engine_over(fake, base) as engine:
        heard = await hear(engine.submit(ask(LONG, max_tokens=400)))
    assert "\u2028" in heard.text
    assert "\x85" in heard.text
    assert "🐟" in heard.text


@pytest.mark.parametrize("refused", [set(), {"continuous_usage_stats"}])
async def test_usage_is_the_servers_count(fake: FakeOpenAI, base: BaseModel, refused: set[str]) -> None:
    fake.refuses = refused
    async with engine_over(fake, base) as engine:
        ended = await hear(engine.submit(ask("hello", max_tokens=400)))
        assert ended.finished is not None
        assert ended.finished.reason is FinishReason.END
        sent = len(base.tokenizer.encode(ended.text, add_special_tokens=False))
        assert ended.finished.usage.completion_tokens == sent + 1  # the end token is generated too
        stopped = await _stop_after(engine, 3)
        assert stopped.finished is not None
        assert stopped.finished.reason is FinishReason.CANCELLED
        said = len(base.tokenizer.encode(stopped.text, add_special_tokens=False))
        assert stopped.finished.usage.completion_tokens >= said > 0
        assert stopped.finished.usage.completion_tokens - said <= 3  # bytes of a character that is not whole yet


async def _stop_after(engine: RemoteEngine, deltas: int) -> Heard:
    generation, heard = engine.submit(ask(LONG, max_tokens=400)), Heard()
    async for event in generation:
        if isinstance(event, Delta):
            heard.text += event.text
            heard.deltas.append(event.text)
        if isinstance(event, Finished):
            heard.finished = event
        if len(heard.deltas) == deltas:
            generation.cancel()
    return heard


BREAKS = {
    "500": "failed|refused",
    "cut": "cut the stream in the middle of an answer, after 3 tokens",
    "cut_cleanly": "cut the stream in the middle of an answer, after 3 tokens",
    "garbage": "no JSON object",
    "html": "text/html",
    "error_event": "EngineCore died",
    "no_usage": "usage",
    "wrong_model": "answered from 'other/model' when asked for 'acme/base'",
    "wrong_prompt_count": "prompt tokens where",
    "wrong_count": "tokens after",
    "abort": "abort",
    "hang": "said nothing for 0.5 s|in time",
    "hang_midway": "said nothing for 0.3 s",
}


@pytest.mark.parametrize("fault", BREAKS)
async def test_a_broken_answer_is_a_clear_error_of_its_request_alone(
    fake: FakeOpenAI, base: BaseModel, fault: str
) -> None:
    async with engine_over(fake, base, **SHORT) as engine:
        other = engine.submit(ask(LONG, scope=Scope(user="other"), max_tokens=100))
        await anext(aiter(other))
        fake.faults.append(fault)
        with pytest.raises(EngineError, match=BREAKS[fault]) as caught:
            await hear(engine.submit(ask("hello")))
        assert f"the server at {fake.url.removeprefix('http://')}" in caught.value.detail or fault == "abort"
        assert len(fake.asked) == 2  # it was not asked again
        assert (await hear(other)).finished is not None
        assert (await hear(engine.submit(ask("and now?")))).finished is not None
        assert engine.stats().running == 0
    await eventually(_idle(fake))


def _idle(fake: FakeOpenAI) -> Any:
    async def idle() -> bool:
        return fake.running == 0

    return idle


# --- asking again


@pytest.mark.parametrize("fault", ["drop", "502", "503", "429:1"])
async def test_transient_failures_are_retried_before_an_answer_begins(
    fake: FakeOpenAI, base: BaseModel, fault: str
) -> None:
    async with engine_over(fake, base) as engine:
        fake.faults = [fault]
        heard = await hear(engine.submit(ask("hello")))
        assert heard.finished is not None
        assert len(fake.asked) == 2
        assert (await hear(engine.submit(ask("hello")))).text == heard.text


async def test_retries_are_bounded(fake: FakeOpenAI, base: BaseModel) -> None:
    async with engine_over(fake, base) as engine:
        fake.faults = ["503"] * 5
        with pytest.raises(Overloaded) as caught:
            await hear(engine.submit(ask("hello")))
        assert caught.value.retry_after_s == 5.0
        assert len(fake.asked) == 3


async def test_how_long_a_request_takes_is_counted_without_its_wait(fake: FakeOpenAI, base: BaseModel) -> None:
    async with engine_over(fake, base, max_rows=1) as engine:
        engine._mean_s, began = 0.0, time.monotonic()
        await asyncio.gather(*(hear(engine.submit(ask(f"{i}", max_tokens=4))) for i in range(30)))
        assert 0 < engine._mean_s < 0.3 * (time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.parametrize(("given", "seconds"), [("30", 30.0), ("99999", 3600.0), ("date", 60.0), ("0", 1.0)])
async def test_a_busy_servers_wait_is_passed_on(fake: FakeOpenAI, base: BaseModel, given: str, seconds: float) -> None:
    async with engine_over(fake, base) as engine:
        fake.faults = [f"429:{formatdate(time.time() + 60, usegmt=True) if given == 'date' else given}"] * 3
        with pytest.raises(Overloaded) as caught:
            await hear(engine.submit(ask("hello")))
        assert caught.value.retry_after_s == pytest.approx(seconds, abs=2)
        assert len(fake.asked) == (3 if given == "0" else 1)


async def test_an_unreachable_server_is_an_error_and_a_returned_one_answers(base: BaseModel) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fake = FakeOpenAI(base.tokenizer, port=port)
    async with fake.open():
        engine = await remote(fake.url, base.folder).__aenter__()
    try:
        assert "cannot be reached" in await heard_error(engine)
        async with fake.open():
            assert (await hear(engine.submit(ask("hello")))).finished is not None
    finally:
        await engine.__aexit__(None, None, None)


async def test_the_deadline_ends_a_request_at_the_server(fake: FakeOpenAI, base: BaseModel) -> None:
    async with engine_over(fake, base) as engine:
        fake.faults = ["hang"]
        heard = await hear(engine.submit(ask("hello", deadline_s=0.2)))
        assert heard.finished is not None
        assert heard.finished.reason is FinishReason.DEADLINE
    await eventually(_idle(fake))
    assert fake.hung_up == 1


# --- fairness in front of the server


async def test_the_server_gets_no_more_than_max_rows_and_in_fair_order(fake: FakeOpenAI, base: BaseModel) -> None:
    order: list[str] = []
    async with engine_over(fake, base, max_rows=2) as engine:

        async def note(name: str) -> None:
            await hear(engine.submit(ask(name, scope=Scope(partner=name[0]), max_tokens=8)))
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for i in range(10):
                group.create_task(note(f"f{i}"))
            await asyncio.sleep(0.01)
            group.create_task(note("calm"))
    assert fake.most_running == 2
    assert order.index("calm") <= 4


# --- adapters


async def test_an_adapter_is_loaded_once_at_run_time_and_again_after_a_restart(
    fake: FakeOpenAI, base: BaseModel, adapters: list[AdapterRef]
) -> None:
    ref = adapters[0]
    async with engine_over(fake, base) as engine:
        many = await asyncio.gather(*(hear(engine.submit(ask("hello", adapter=ref))) for _ in range(6)))
        assert len({heard.text for heard in many}) == 1
        assert fake.loaded == [ref.sha256]
        assert fake.adapters == {ref.sha256: str(ref.folder)}
        fake.adapters.clear()
        assert (await hear(engine.submit(ask("hello", adapter=ref)))).text == many[0].text
        assert fake.loaded == [ref.sha256] * 2
    assert all("already" in said for said in fake.violations)


async def test_the_folder_is_named_as_the_server_sees_it(
    fake: FakeOpenAI, base: BaseModel, adapters: list[AdapterRef], tmp_path: Path
) -> None:
    ref = adapters[0]
    shutil.copytree(ref.folder, tmp_path / ref.sha256)
    here = AdapterRef(ref.sha256, Path("/only/here"), ref.label)
    async with engine_over(fake, base, adapters_there=f"{tmp_path}/") as engine:
        await hear(engine.submit(ask("hello", adapter=here)))
    assert fake.adapters == {ref.sha256: str(tmp_path / ref.sha256)}


@pytest.mark.parametrize("how", ["resolver", "loaded at its start"])
async def test_a_server_that_has_the_adapter_is_not_asked_to_load_it(
    base: BaseModel, adapters: list[AdapterRef], tmp_path: Path, how: str
) -> None:
    ref = adapters[0]
    fake = FakeOpenAI(base.tokenizer, loads=False)
    if how == "resolver":
        shutil.copytree(ref.folder, tmp_path / ref.sha256)
        fake.resolves = tmp_path
    else:
        fake.adapters[ref.sha256] = "/somewhere"
    async with fake.open(), engine_over(fake, base) as engine:
        assert (await hear(engine.submit(ask("hello", adapter=ref)))).finished is not None
        gone = AdapterRef("0" * 64, tmp_path, "gone@3")
        detail = await heard_error(engine, AdapterUnusable, adapter=gone)
        assert "gone@3" in detail
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in detail
        assert str(tmp_path) in detail


async def test_no_adapter_is_loaded_into_another_base_model(
    fake: FakeOpenAI, base: BaseModel, adapters: list[AdapterRef]
) -> None:
    async with engine_over(fake, base) as engine:
        fake.base = "acme/next"
        assert "does not serve 'acme/base'" in await heard_error(engine)
        assert "no longer serves acme/base" in await heard_error(engine, adapter=adapters[0])
    assert fake.loaded == []


# --- at the start


async def test_a_strict_server_is_asked_without_what_it_refuses(fake: FakeOpenAI, base: BaseModel) -> None:
    fake.refuses = {"continuous_usage_stats", "cache_salt", "top_k", "include_stop_str_in_output"}
    async with engine_over(fake, base) as engine:
        whole = await hear(engine.submit(ask(LONG, max_tokens=40)))
        stop = whole.text[20:22]
        heard = await hear(engine.submit(ask(LONG, max_tokens=40, stop=(stop,))))
        assert heard.finished is not None
        assert heard.finished.reason is FinishReason.STOP
        assert heard.text == whole.text[: whole.text.index(stop)]
        assert "does not know top_k" in await heard_error(engine, top_k=5)
    assert all(not fake.refuses & sent.keys() for sent in fake.asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"api_key": "right"}, "refuses the key (401): set engine.api_key"),
        ({"healthy": False}, "is busy (503)"),
        ({"faults": ["no_usage"]}, "usage"),
        ({"faults": ["wrong_prompt_count"]}, "prompt tokens"),
        ({"faults": ["html"]}, "text/html"),
        ({"refuses": {"prompt"}}, "prompt"),
    ],
)
async def test_a_server_that_cannot_serve_is_refused_at_start(
    base: BaseModel, change: dict[str, Any], said: str
) -> None:
    fake = FakeOpenAI(base.tokenizer, **change)
    async with fake.open():
        with pytest.raises(ModelLoadFailed) as caught:
            await remote(fake.url, base.folder).__aenter__()
    assert said in caught.value.detail


async def test_the_base_model_must_be_the_one_and_of_our_tokenizer(fake: FakeOpenAI, base: BaseModel) -> None:
    async def refused(**settings: Any) -> str:
        with pytest.raises(ModelLoadFailed) as caught:
            await remote(fake.url, base.folder, **settings).__aenter__()
        return caught.value.detail

    assert "does not serve engine.model_there=acme/other; there is acme/base" in await refused(model_there="acme/other")
    fake.tokenizer = _Shifted(base.tokenizer)
    assert "they are not the same base model" in await refused()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        fake.url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    assert "cannot be reached" in await refused()


class _Shifted:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, **options: Any) -> list[int]:
        return [i + 1 for i in self._tokenizer.encode(text, **options)]


async def test_a_folder_without_weights_needs_the_fingerprint_and_trains_nothing(
    fake: FakeOpenAI, base: BaseModel, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer-only"
    shutil.copytree(base.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelLoadFailed, match=r"engine\.fingerprint must say"):
        await remote(fake.url, folder).__aenter__()
    async with remote(fake.url, folder, fingerprint=base.fingerprint) as engine:
        assert (engine.info.fingerprint, engine.info.folder) == (base.fingerprint, None)
        assert (await hear(engine.submit(ask("hello")))).finished is not None
    async with remote(fake.url, base.folder) as engine:
        assert (engine.info.fingerprint, engine.info.folder) == (base.fingerprint, base.folder)
        assert engine.info.description == f"vllm at {fake.url.removeprefix('http://')}"
    with pytest.raises(ModelLoadFailed, match=r"engine\.fingerprint=0123"):
        await remote(fake.url, base.folder, fingerprint="0123").__aenter__()


async def test_no_secret_and_no_text_is_logged(base: BaseModel, written: io.StringIO) -> None:
    fake = FakeOpenAI(base.tokenizer, api_key="k3y-that-nobody-sees")
    async with fake.open(), engine_over(fake, base, api_key=fake.api_key, **SHORT) as engine:
        for fault in ["", "500", "503", "drop", "garbage", "cut"]:
            fake.faults = [fault]
            request = dataclasses.replace(ask("a private matter"), id="g1")
            await asyncio.gather(hear(engine.submit(request)), return_exceptions=True)
        assert fake.api_key not in repr(engine.settings)
    log = written.getvalue()
    assert "remote.failed" in log
    assert fake.api_key not in log
    assert "private" not in log
