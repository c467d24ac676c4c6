"""Steps over static buffers give what steps over fresh ones give: rows join, leave and move, and everything grows.

On a CPU they run uncaptured; with a GPU the tests marked `gpu` replay real graphs.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.config.sections import ModelSettings
from core.engine.runtime import cuda_graphs
from core.engine.runtime.cuda_graphs import DecodeGraphs, GraphShape, length_bucket, row_bucket
from core.engine.runtime.kv_cache import LENGTH_STEP
from core.engine.runtime.loading import load_for_serving
from core.engine.runtime.runner import Runner
from core.model.base import BaseModel
from core.types import AdapterRef
from tests.bench import gpu
from tests.core.engine.lora.test_exact import prompts, spy_answers
from tests.core.engine.runtime.test_families import FAMILIES, made
from tests.core.engine.runtime.test_fused import adapter
from tests.support.engine_dialogue import ask, hear, is_blank, running
from tests.support.tiny import peft_answers, save_adapter

N = 24


async def test_any_mix_over_static_buffers_equals_peft(
    base: BaseModel, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows join and leave, the base alone, one adapter, many: the oracle's tokens, and no row's leftovers."""
    monkeypatch.setattr("core.engine.runtime.loop.Runner", partial(Runner, static=True))
    shapes: set[GraphShape] = set()
    add = DecodeGraphs._add
    monkeypatch.setattr(DecodeGraphs, "_add", lambda self, shape: shapes.add(shape) or add(self, shape))
    refs: list[AdapterRef | None] = [None, adapters[0], *adapters, None, *adapters]
    texts = [f"{i} " + "long question " * (7 * i % 25) for i in range(len(refs))]
    lengths = [N - 3 * (i % 5) for i in range(len(refs))]
    expected = peft_answers(base, refs, prompts(base, texts), N)
    async with running(base, max_rows=6) as engine:
        engine.thread.chunk = 50
        answers = spy_answers(engine)
        await hear(engine.submit(ask(texts[0], max_tokens=lengths[0])))
        async with asyncio.TaskGroup() as group:
            for ref, text, length in list(zip(refs, texts, lengths, strict=True))[1:]:
                group.create_task(hear(engine.submit(ask(text, adapter=ref, max_tokens=length))))
                await asyncio.sleep(0.005)
        assert [answers[text] for text in texts] == [ids[:n] for ids, n in zip(expected, lengths, strict=True)]
        assert {shape.rows for shape in shapes} > {1}
        assert {shape.slots > 0 for shape in shapes} == {True, False}
        assert is_blank(engine.thread.runner.cache)


async def test_a_family_of_windows_and_caps_over_static_buffers_equals_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that runs its own forward pass, with hooks for its adapters."""
    monkeypatch.setattr("core.engine.runtime.loop.Runner", partial(Runner, static=True))
    model = made("Gemma2", tmp_path / "base", FAMILIES["Gemma2"][0])
    first = save_adapter(model, tmp_path / "first", seed=1, std=0.1)
    refs = [None, first, None, first]
    texts = [f"{i} " + "along the river " * (i % 4) for i in range(4)]
    expected = peft_answers(model, refs, prompts(model, texts), 12, attention="eager")
    async with running(model, max_rows=4, max_context=256) as engine:
        answers = spy_answers(engine)
        requests = [ask(text, adapter=ref, max_tokens=12) for text, ref in zip(texts, refs, strict=True)]
        await asyncio.gather(*(hear(engine.submit(request)) for request in requests))
        assert [answers[text] for text in texts] == expected
        assert engine.thread.runner.steps is not None
        assert engine.thread.runner.steps.graphs


def grown(model: BaseModel, runner: Runner) -> list[torch.Tensor]:
    """Logits of every step while rows, adapters, ranks and lengths grow, and the first row leaves in the middle."""
    found = []
    slots: list[int | None] = []
    held = [None, None, adapter(model, "a", 2), adapter(model, "b", 2, only="v_proj"), None, adapter(model, "c", 6)]
    held += [None, adapter(model, "d", 1), None, None]
    for i, one in enumerate(held):
        slots.append(None if one is None else runner.lora.acquire(one))
        row = runner.cache.add_row()
        prompt = [(3 + 7 * i + 5 * j) % 250 + 3 for j in range(120 if i == 4 else 20 + i)]
        runner.run(row, [prompt], slots[row:])
        found += [runner.run(0, [[9 + j] for j in range(row + 1)], slots).clone() for _ in range(3)]
    for step in range(150):  # past the first length, 256
        out = runner.run(0, [[(step + j) % 250] for j in range(len(slots))], slots)
        if step % 30 == 0:
            found.append(out.clone())
    runner.cache.wipe(0)
    runner.cache.move(len(slots) - 1, 0)
    runner.cache.drop_last()
    slots = [slots[-1], *slots[1:-1]]
    found.append(runner.run(0, [[5]] * len(slots), slots).clone())
    found.append(runner.run(0, [[5]] * 3, slots[:3]).clone())  # not all rows, as after a pass that failed
    assert is_blank(runner.cache)
    return found


@torch.inference_mode()
def test_reallocation_changes_no_result(base: BaseModel) -> None:
    steps = Runner(base, max_rows=12, context=400, static=True)
    fresh = Runner(base, max_rows=12, context=400)
    assert fresh.steps is None
    for ours, wanted in zip(grown(base, steps), grown(base, fresh), strict=True):
        assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert steps.steps is not None
    assert {shape.rank for shape in steps.steps.graphs} == {6}  # nothing of a narrower layout is left
    assert all(shape.rows <= steps.cache.slots and shape.length <= steps.cache.length for shape in steps.steps.graphs)


@torch.inference_mode()
def test_base_model_rows_run_steps_without_adapters(base: BaseModel) -> None:
    runner = Runner(base, max_rows=4, context=128, static=True)
    assert runner.steps is not None
    slot = runner.lora.acquire(adapter(base, "a", 4))
    for _ in range(3):
        runner.run(runner.cache.add_row(), [[5, 6, 7]], [None])
    runner.run(0, [[5]] * 3, [None] * 3)
    runner.run(0, [[5]] * 3, [None, slot, None])
    assert list(runner.steps.graphs) == [GraphShape(4, 128, 0, 0), GraphShape(4, 128, 1, 4)]
    chunks, steps = 3 * LENGTH_STEP, 2 * 4 * 128  # what was read, padding and all
    assert runner.positions_read == chunks + steps
    assert runner.positions_held == 3 * 3 + 3 * 4 + 3 * 5


@torch.inference_mode()
def test_padding_rows_never_write_to_other_rows(base: BaseModel) -> None:
    """Three of four rows step in a shape of four: the fourth row's keys and values stay as they are."""
    runner = Runner(base, max_rows=4, context=128, static=True)
    for i in range(4):
        runner.run(runner.cache.add_row(), [[5 + i, 6, 7]], [None])
    before = runner.cache.take_out(3)
    runner.run(0, [[5]] * 3, [None] * 3)
    assert all(torch.equal(a, b) for a, b in zip(runner.cache.take_out(3), before, strict=True))
    assert is_blank(runner.cache)


@pytest.mark.parametrize(
    ("error", "usable"), [(RuntimeError("operation not permitted"), False), (torch.OutOfMemoryError("full"), True)]
)
@torch.inference_mode()
def test_after_a_failed_capture_steps_run_uncaptured(
    base: BaseModel,
    error: Exception,
    usable: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(self: DecodeGraphs, shape: GraphShape) -> None:
        raise error

    runner, fresh = Runner(base, max_rows=2, context=128, static=True), Runner(base, max_rows=2, context=128)
    fresh.layers = None
    assert runner.steps is not None
    runner.steps.captures = True
    monkeypatch.setattr(DecodeGraphs, "_capture", fail)
    for one in (runner, fresh):
        one.run(one.cache.add_row(), [[5, 6, 7]], [None])
    for _ in range(2):
        assert torch.equal(runner.run(0, [[8]], [None]), fresh.run(0, [[8]], [None]))
    assert runner.cache.used == fresh.cache.used
    assert runner.steps.usable is usable
    assert [record.levelname for record in caplog.records if record.name == "core.engine.runtime.cuda_graphs"] == [
        "WARNING"
    ]


@torch.inference_mode()
def test_a_shape_without_memory_is_not_captured_again(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(self: DecodeGraphs, shape: GraphShape) -> None:
        tried.append(shape.rows)
        raise torch.OutOfMemoryError("full")

    runner = Runner(base, max_rows=2, context=128, static=True)
    assert runner.steps is not None
    for _ in range(2):
        runner.run(runner.cache.add_row(), [[5, 6, 7]], [None])
    runner.steps.captures = True
    monkeypatch.setattr(DecodeGraphs, "_capture", fail)
    for rows in (1, 2, 1, 2):
        runner.run(0, [[5]] * rows, [None] * rows)
    assert tried == [1, 2]


@torch.inference_mode()
def test_graphs_never_share_memory_with_dropped_ones(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up a pool with the last graph in it, and ends a capture into it as an internal error."""
    runner = Runner(base, max_rows=2, context=400, static=True)
    steps = runner.steps
    assert steps is not None
    pools = iter(range(1, 9))
    monkeypatch.setattr(DecodeGraphs, "_new_pool", lambda self: (0, next(pools)))
    runner.run(runner.cache.add_row(), [[5, 6, 7]], [None])
    runner.run(0, [[5]], [None])
    first = steps._pool
    runner.run(0, [[5]], [None])
    assert steps._pool == first
    runner.run(runner.cache.add_row(), [[5] * 300], [None])  # another layout
    runner.run(0, [[5]] * 2, [None] * 2)
    assert steps._pool != first


@pytest.mark.parametrize("nth", [0, 1, 2, 9, 13])
@torch.inference_mode()
def test_adapters_keep_running_after_out_of_memory_for_a_higher_rank(
    base: BaseModel, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends at any place of a new layout: steps over the old one are gone, and all goes on, then grows."""
    runner, fresh = Runner(base, max_rows=3, context=128, static=True), Runner(base, max_rows=3, context=128)
    small, other, wide = adapter(base, "a", 2), adapter(base, "b", 2), adapter(base, "c", 6)
    slots: list[int | None] = []
    for one in (runner, fresh):
        slots = [one.lora.acquire(small)]
        one.run(one.cache.add_row(), [[5, 6, 7]], slots)
        one.run(0, [[8]], slots)
    new_zeros, left = torch.Tensor.new_zeros, [nth]

    def fail(self: torch.Tensor, *size: int) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("full")
        return new_zeros(self, *size)

    assert runner.steps is not None
    for one in (other, wide):  # another slot, and a higher rank before that slot is there everywhere
        left[0] = nth
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_zeros", fail)
            with pytest.raises(torch.OutOfMemoryError):
                runner.lora.acquire(one)
        before = dict(runner.steps.graphs)
        ours, wanted = runner.run(0, [[9]], slots), fresh.run(0, [[9]], slots)
        assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
        assert before
        assert runner.steps._versions == (runner.cache.version, runner.lora.version)
    for one in (wide, other):
        slots.append(runner.lora.acquire(one))
        assert fresh.lora.acquire(one) == slots[-1]
        for each in (runner, fresh):
            each.run(each.cache.add_row(), [[5, 6, 7]], slots[-1:])
        ours, wanted = runner.run(0, [[9]] * len(slots), slots), fresh.run(0, [[9]] * len(slots), slots)
        assert float((ours - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@torch.inference_mode()
def test_a_failed_reallocation_invalidates_graphs(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were given up already must not be read by a step captured before."""
    runner = Runner(base, max_rows=4, context=400, static=True)
    runner.run(runner.cache.add_row(), [[5, 6, 7]], [None])
    runner.run(0, [[8]], [None])
    version, keys = runner.cache.version, runner.cache.layers[0].keys
    resize = type(runner.cache.layers[1]).resize

    def fail(self: object, *args: int, **options: object) -> None:
        if self is runner.cache.layers[1]:
            raise torch.OutOfMemoryError("full")
        resize(self, *args, **options)

    monkeypatch.setattr(type(runner.cache.layers[1]), "resize", fail)
    with pytest.raises(torch.OutOfMemoryError):
        runner.cache.add_row(300)
    assert runner.cache.layers[0].keys is not keys
    assert runner.cache.version != version


@torch.inference_mode()
def test_the_number_of_graphs_is_bounded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    runner = Runner(base, max_rows=4, context=128, static=True)
    assert runner.steps is not None
    for _ in range(4):
        runner.run(runner.cache.add_row(), [[5, 6, 7]], [None])
    for rows in (1, 2, 1, 4):
        runner.run(0, [[5]] * rows, [None] * rows)
    assert [shape.rows for shape in runner.steps.graphs] == [1, 4]


@pytest.mark.slow
def test_the_bench_for_a_gpu_runs_and_its_peers_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.engine.runtime import loop

    monkeypatch.setattr(loop, "Runner", loop.Runner)  # the bench sets another one
    found = gpu.measure("tiny", torch.device("cpu"), rows=3, adapters=2, rounds=1)
    assert found["equal_tokens"] == {"base_vs_generate": 1.0, "mixed_vs_peft": 1.0}
    # How many is a matter of time: of which rows met in a step, and whether a layout for more adapters came in between.
    assert found["graphs"]["captured"] >= 1


@given(st.integers(1, 200_000))
def test_buckets_hold_what_they_are_for_and_waste_little(number: int) -> None:
    assert number <= row_bucket(number) < number + 8
    assert number <= length_bucket(number) < number + max(128, number / 3)
    assert length_bucket(length_bucket(number)) == length_bucket(number)
    assert row_bucket(row_bucket(number)) == row_bucket(number)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Qwen3"])
@torch.inference_mode()
def test_replayed_graphs_equal_uncaptured_steps(kind: str, tmp_path: Path) -> None:
    folder = made(kind, tmp_path / "base", FAMILIES[kind][0]).folder
    model = load_for_serving(ModelSettings(name=str(folder), device="cuda", dtype="float32"), tmp_path)
    captured = Runner(model, max_rows=12, context=400)
    plain = Runner(model, max_rows=12, context=400, static=False)
    assert captured.steps is not None
    for ours, wanted in zip(grown(model, captured), grown(model, plain), strict=True):
        assert float((ours - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())
    assert captured.steps.usable
    assert captured.steps.graphs
    assert all(graph is not None for graph in captured.steps.graphs.values())
