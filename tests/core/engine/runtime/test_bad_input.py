"""Bad input is a typed error of its request alone; other requests and the engine go on."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from core.engine.local import LocalEngine
from core.engine.protocol import Request
from core.errors import AdapterUnusable, AppError, BadInput, PromptTooLong
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.support.engine_dialogue import ask, hear, is_blank, running

NAN = float("nan")
UNKNOWN = AdapterRef("0" * 64, Path("/nowhere"), "gone@1")
BAD: dict[str, tuple[Callable[[], Request], type[AppError], str]] = {
    "longer than the context": (lambda: ask("a" * 600), PromptTooLong, "tokens"),
    "longer than allowed": (lambda: ask("a" * 10, max_prompt_tokens=5), PromptTooLong, "tokens"),
    "max_tokens 0": (lambda: ask("x", max_tokens=0), BadInput, "max_tokens"),
    "max_tokens -1": (lambda: ask("x", max_tokens=-1), BadInput, "max_tokens"),
    "temperature -1": (lambda: ask("x", temperature=-1.0), BadInput, "temperature"),
    "temperature NaN": (lambda: ask("x", temperature=NAN), BadInput, "temperature"),
    "temperature inf": (lambda: ask("x", temperature=float("inf")), BadInput, "temperature"),
    "top_p 0": (lambda: ask("x", top_p=0.0), BadInput, "top_p"),
    "top_p NaN": (lambda: ask("x", top_p=NAN), BadInput, "top_p"),
    "top_k -1": (lambda: ask("x", top_k=-1), BadInput, "top_k"),
    "min_p 2": (lambda: ask("x", min_p=2.0), BadInput, "min_p"),
    "penalty 0": (lambda: ask("x", repetition_penalty=0.0), BadInput, "repetition_penalty"),
    "penalty 1e-38": (lambda: ask("x", repetition_penalty=1e-38), BadInput, "repetition_penalty"),
    "penalty 101": (lambda: ask("x", repetition_penalty=101.0), BadInput, "repetition_penalty"),
    "penalty NaN": (lambda: ask("x", repetition_penalty=NAN), BadInput, "repetition_penalty"),
    "deadline inf": (lambda: ask("x", deadline_s=float("inf")), BadInput, "deadline_s"),
    "deadline NaN": (lambda: ask("x", deadline_s=NAN), BadInput, "deadline_s"),
    "unknown adapter": (lambda: ask("x", adapter=UNKNOWN), AdapterUnusable, "gone@1"),
}


@pytest.fixture
def endless(base: BaseModel) -> BaseModel:
    return dataclasses.replace(base, eos_ids=frozenset())


@asynccontextmanager
async def undisturbed(model: BaseModel) -> AsyncIterator[LocalEngine]:
    """An engine in which a long answer runs meanwhile: it must be as it is alone, and another must follow."""
    async with running(model, max_rows=2) as engine:
        alone = (await hear(engine.submit(ask("long", max_tokens=60, deadline_s=600)))).text
        beside = asyncio.create_task(hear(engine.submit(ask("long", max_tokens=60, deadline_s=600))))
        await asyncio.sleep(0)
        yield engine
        assert (await beside).text == alone
        assert (await hear(engine.submit(ask("long", max_tokens=60, deadline_s=600)))).text == alone
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert is_blank(engine.thread.runner.cache)
        assert not engine.thread.runner.lora.users


async def test_bad_input_is_a_typed_error_and_the_engine_goes_on(endless: BaseModel) -> None:
    async with undisturbed(endless) as engine:
        for what, (request, kind, named) in BAD.items():
            before = engine.stats().ended.get(kind.__name__, 0)
            with pytest.raises(kind) as caught:
                await hear(engine.submit(request()))
            assert named in str(caught.value), what
            assert engine.stats().ended[kind.__name__] == before + 1


async def test_an_adapter_that_is_deleted_while_its_request_waits(
    endless: BaseModel, adapters: list[AdapterRef], tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(adapters[0].folder, folder)
    doomed = AdapterRef("d" * 64, folder, "doomed@1")
    async with undisturbed(endless) as engine:
        ahead = [engine.submit(ask(f"{i}", max_tokens=30)) for i in range(4)]
        waiting = engine.submit(ask("doomed", adapter=doomed))
        shutil.rmtree(folder)
        with pytest.raises(AdapterUnusable, match=r"doomed@1.*does not exist"):
            await hear(waiting)
        assert all(one.text for one in await asyncio.gather(*map(hear, ahead)))


async def test_an_adapter_that_is_deleted_while_it_runs_answers_on(
    endless: BaseModel, adapters: list[AdapterRef], tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(adapters[0].folder, folder)
    async with undisturbed(endless) as engine:
        alone = await hear(engine.submit(ask("x", adapter=adapters[0])))
        generation = engine.submit(ask("x", adapter=AdapterRef("d" * 64, folder, "doomed@1")))
        await anext(generation)
        shutil.rmtree(folder)
        assert (await hear(generation)).text == alone.text
