"""Each compiled operator against float64 arithmetic; building the library, and what happens where that fails."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from core.engine.cpu import build as building
from core.engine.cpu import compiled as module
from core.engine.cpu.compiled import CompiledOperators, compiled, in_blocks, tiles_of, unavailable_reason
from core.engine.runtime.runner import Runner
from tests.core.engine.runtime.test_fused import FAMILY, adapter, answers, made
from tests.support.engine_operators import add_norm, attend, rope, silu_mul

CLOSE = 2e-6  # of the largest value
found = compiled()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(found is None, reason="no compiler here")]
# (rows, width, threads)
ROWS = [(1, 1, 2), (1, 48, 1), (1, 577, 2), (70, 5, 1), (70, 16, 2), (70, 576, 1)]
# (rows, outs, width, bias, threads): every pair of rows and outs, the rest in turn
MATMULS = [
    (rows, outs, (1, 5, 16, 48, 576, 577)[i * 5 % 6], bool(i % 2), 1 + i // 2 % 2)
    for i, (rows, outs) in enumerate(product((1, 7, 8, 19), (1, 32, 47, 200)))
]
HEADS = [(1, 1, 64), (2, 3, 16), (3, 3, 64), (5, 2, 33), (8, 1, 128)]  # (queries per key, keys, size)
WINDOWS = [None, 1, 4, 20, 1000]
ATTENDS = [(*heads, WINDOWS[(i + turn) % 5], 1 + turn) for i, heads in enumerate(HEADS) for turn in range(2)]


@pytest.fixture
def operators() -> CompiledOperators:
    assert found is not None
    return found


@contextmanager
def on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(value: Tensor, truth: Tensor) -> None:
    assert float((value.double() - truth).abs().max()) <= CLOSE * float(truth.abs().max())


@pytest.mark.parametrize(("rows", "width", "threads"), ROWS)
def test_add_norm(operators: CompiledOperators, rows: int, width: int, threads: int) -> None:
    x, delta, weight = random(rows, width), random(rows, width, seed=1), random(width, seed=2)
    truth = x.double() + delta
    own = x.clone()
    with on(threads):
        normed = add_norm(operators, own, delta, weight, 1e-5)
    assert torch.equal(own, x + delta)
    assert_close(normed, functional.rms_norm(truth, (width,), weight.double(), 1e-5))
    assert torch.equal(add_norm(operators, own[-1:].clone(), None, weight, 1e-5), normed[-1:])


@pytest.mark.parametrize(("rows", "width", "threads"), ROWS)
def test_silu_mul(operators: CompiledOperators, rows: int, width: int, threads: int) -> None:
    gate_up = random(rows, 2 * width) * 5
    with on(threads):
        made = silu_mul(operators, gate_up)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(made, functional.silu(gate) * up)
    assert torch.equal(silu_mul(operators, gate_up[-1:]), made[-1:])


def test_silu_is_right_for_every_size_of_number(operators: CompiledOperators) -> None:
    gates = torch.cat([sign * torch.logspace(-38, 38, 4000) for sign in (1, -1)] + [torch.linspace(-104, 104, 4001)])
    made = silu_mul(operators, torch.stack([gates, torch.ones_like(gates)], dim=1)).flatten()
    truth = functional.silu(gates.double())
    assert ((made - truth).abs() <= 4e-7 * truth.abs() + 1e-30).all()
    special = torch.tensor([math.nan, math.inf])
    heard = silu_mul(operators, torch.stack([special, torch.ones(2)], dim=1)).flatten()
    assert heard.isnan().tolist() == [True, False]
    assert heard[1] == math.inf


@pytest.mark.parametrize(("rows", "outs", "width", "bias", "threads"), MATMULS)
def test_float_matmul(operators: CompiledOperators, rows: int, outs: int, width: int, bias: bool, threads: int) -> None:
    x, weight, added = random(rows, width), random(outs, width, seed=1), random(outs, seed=2) if bias else None
    packed = in_blocks(weight, operators.float_block)
    with on(threads):
        y = operators.float_matmul(x, packed, added, outs)
    assert_close(y, functional.linear(x.double(), weight.double(), None if added is None else added.double()))
    assert torch.equal(operators.float_matmul(x[-1:], packed, added, outs), y[-1:])


@pytest.mark.parametrize(("some", "multiple", "blank"), [(1, 1, 5), (4, 16, 0), (4, 16, 5)])
def test_blocks_hold_all_weights_and_padding(some: int, multiple: int, blank: int) -> None:
    weight = torch.arange(1, 1 + 37 * 10).view(37, 10)
    blocks = in_blocks(weight, 16, some, multiple=multiple, blank=blank)
    back = blocks.transpose(1, 2).flatten(0, 1).flatten(1)
    assert torch.equal(back[:37, :10], weight)
    assert back.shape[1] % multiple == 0
    assert int(back.sum()) == int(weight.sum()) + blank * (back.numel() - weight.numel())


def test_non_finite_values_stay_in_their_row(operators: CompiledOperators) -> None:
    for wrong in (math.nan, math.inf, -math.inf):
        x = random(3, 33)
        x[1, 7] = wrong
        normed = add_norm(operators, x, None, torch.ones(33), 1e-5)
        assert normed.isfinite().all(1).tolist() == [True, False, True]
        y = operators.float_matmul(x, in_blocks(random(40, 33), operators.float_block), None, 40)
        assert y.isfinite().any(1).tolist() == [True, False, True]


@pytest.mark.parametrize(("size", "threads"), [(2, 2), (16, 1), (64, 2), (80, 1)])
def test_rope(operators: CompiledOperators, size: int, threads: int) -> None:
    qkv, angles = random(70, 7, size), random(70, size // 2, seed=1).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    signed = torch.cat((-sin[:, : size // 2], sin[:, size // 2 :]), dim=1)
    first, second = qkv.double().chunk(2, dim=-1)
    truth = qkv * cos.double()[:, None] + torch.cat((-second, first), dim=-1) * sin.double()[:, None]
    own = qkv.clone()
    with on(threads):
        rope(operators, own, cos, signed, 5)
    assert_close(own[:, :5], truth[:, :5])
    assert torch.equal(own[:, 5:], qkv[:, 5:])


@pytest.mark.parametrize(("group", "kv", "size", "window", "threads"), ATTENDS)
def test_attend(operators: CompiledOperators, group: int, kv: int, size: int, window: int | None, threads: int) -> None:
    """Single tokens and chunks of prompts, at the beginning of a row and within it, in one batch and alone."""
    slots, capacity = 6, 91
    keys, values = random(slots, kv, capacity, size), random(slots, kv, capacity, size, seed=1)
    rows = [(1, 0, 1), (2, 90, 1), (5, 0, 70), (0, 17, 1), (4, 40, 2), (3, 33, 19)]
    qkv = random(sum(count for *_, count in rows), (group + 2) * kv, size, seed=2)
    own_keys, own_values = keys.clone(), values.clone()
    with on(threads):
        out = attend(operators, qkv, own_keys, own_values, rows, window, 0.3)
    first = 0
    for slot, start, count in rows:
        some = slice(first, first + count)
        keys[slot, :, start : start + count] = qkv[some, group * kv : (group + 1) * kv].transpose(0, 1)
        values[slot, :, start : start + count] = qkv[some, (group + 1) * kv :].transpose(0, 1)
        first += count
    assert torch.equal(own_keys, keys)  # and nothing else was written
    assert torch.equal(own_values, values)
    first = 0
    for slot, start, count in rows:
        for token in range(count):
            stop = start + token + 1
            seen = slice(max(0, stop - (window or 1000)), stop)
            past, said = (one[slot, :, seen].double().repeat_interleave(group, dim=0) for one in (keys, values))
            scores = torch.einsum("hd,hnd->hn", qkv[first + token, : group * kv].double(), past) * 0.3
            truth = torch.einsum("hn,hnd->hd", scores.softmax(-1), said)
            assert_close(out[first + token].view(group * kv, size), truth)
        own = qkv[first : first + count]
        assert torch.equal(
            attend(operators, own, keys, values, [(slot, start, count)], window, 0.3), out[first : first + count]
        )
        first += count


def test_the_result_does_not_depend_on_the_chunks_of_a_prompt(operators: CompiledOperators) -> None:
    keys, values, qkv = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 16), random(60, 3 * 2 + 2 * 2, 16)
    for window, cut in ((None, 2), (None, 31), (7, 33), (7, 58)):
        whole = attend(operators, qkv, keys, values, [(0, 0, 60)], window, 0.3)
        parts = [attend(operators, qkv[:cut], keys, values, [(0, 0, cut)], window, 0.3)]
        parts.append(attend(operators, qkv[cut:], keys, values, [(0, cut, 60 - cut)], window, 0.3))
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("rank", "outs", "width", "threads"),
    [
        (1, (7,), 577, 1),
        (8, (576, 192, 192), 64, 2),
        (8, (576, 192, 192), 3, 1),
        (5, (33, 48), 577, 2),
        (64, (40,), 64, 1),
    ],
)
def test_add_lora(operators: CompiledOperators, rank: int, outs: tuple[int, ...], width: int, threads: int) -> None:
    slots = [2, None, 0, 2, 2, None, 2, 2, 2, 1, 0, 2]
    parts, total = len(outs), sum(outs)
    x, y = random(len(slots), width), random(len(slots), total, seed=1)
    a = random(3, parts * rank, width, seed=2)
    b = torch.full((3, parts * rank, total), math.nan)  # only each part's own block is read
    truth = y.double()
    begin = 0
    for part, out in enumerate(outs):
        ranks, columns = slice(part * rank, (part + 1) * rank), slice(begin, begin + out)
        b[:, ranks, columns] = random(3, rank, out, seed=3 + part)
        for token, slot in enumerate(slots):
            if slot is not None:
                truth[token, columns] += (
                    x[token].double() @ a[slot, ranks].double().t() @ b[slot, ranks, columns].double()
                )
        begin += out
    own = y.clone()
    with on(threads):
        operators.add_lora(x, own, a, b, tiles_of(slots), outs)
    assert_close(own, truth)
    assert torch.equal(own[[1, 5]], y[[1, 5]])
    alone = y[9:10].clone()
    operators.add_lora(x[9:10], alone, a, b, tiles_of([1]), outs)
    assert torch.equal(alone[0], own[9])


def test_a_token_gets_the_same_result_in_any_tile(operators: CompiledOperators) -> None:
    x, a, b = random(4, 100), random(1, 8, 100, seed=1), random(1, 8, 60, seed=2)
    for count in range(1, 5):
        y = torch.zeros(count, 60)
        operators.add_lora(x[:count], y, a, b, tiles_of([0] * count), (60,))
        alone = torch.zeros(1, 60)
        operators.add_lora(x[count - 1 : count], alone, a, b, tiles_of([0]), (60,))
        assert torch.equal(y[-1:], alone)


def test_a_copy_shares_the_operators(operators: CompiledOperators) -> None:
    assert copy.deepcopy({"held": operators})["held"] is operators


def test_tiles() -> None:
    slots = [3, None, 0, 3, 3, 3, 3]
    assert tiles_of(slots).tolist() == [[3, 4, 0, 3, 4, 5], [3, 1, 6, 0, 0, 0], [0, 1, 2, 0, 0, 0]]
    assert tiles_of([None]).shape == (0, 6)


@pytest.mark.parametrize("kind", FAMILY)
@torch.inference_mode()
def test_a_model_gives_the_same_logits_without_operators(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = []
    for built in (found, None):
        for user in ("lora.slots", "cpu.packed"):
            monkeypatch.setattr(f"core.engine.{user}.compiled", lambda built=built: built)
        model = made(kind, tmp_path / str(built is None), **FAMILY[kind])
        runner = Runner(model, max_rows=5, context=256)
        assert (runner.layers is not None) is (built is not None)
        a, b = (runner.lora.acquire(adapter(model, name, rank)) for name, rank in (("a", 8), ("b", 3)))
        logits.append(answers(runner, [a, None, b, b, a]))
    assert float((logits[0] - logits[1]).abs().max()) <= 2e-5 * float(logits[1].abs().max())


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No library is built yet."""
    monkeypatch.setattr(building, "user_cache_path", lambda name: tmp_path)
    module._outcome.cache_clear()
    yield tmp_path / "kernels"
    module._outcome.cache_clear()


def test_the_library_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda _: building.built_library(), range(2)))
    assert built == [*fresh.glob("*.so")] * 2
    ctypes.CDLL(str(built[0]))
    monkeypatch.setattr(building, "FLAGS", ("-no-such-flag",))  # a second build would fail
    assert compiled() is None


@pytest.fixture
def copied(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Builds copy the library of this machine; each call of the compiler is listed."""
    built, run, calls = building.built_library, subprocess.run, []
    monkeypatch.undo()
    there = built()
    monkeypatch.setattr(building, "user_cache_path", lambda name: fresh.parent)

    def compile_(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "--version" in command:
            return run(command, **options)
        calls.append(command)
        shutil.copyfile(there, command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", compile_)
    return calls


@pytest.mark.skipif(compiled() is None, reason="no compiler")
def test_a_damaged_library_is_put_aside_and_built_anew(copied: list[list[str]]) -> None:
    library = building.built_library()
    whole = library.read_bytes()
    for damaged in (whole[:1000], whole[:-1] + b"x"):
        library.write_bytes(damaged)
        assert building.built_library().read_bytes() == whole
        assert library.with_suffix(".bad").read_bytes() == damaged
    assert len(copied) == 3


@pytest.mark.skipif(compiled() is None, reason="no compiler")
def test_a_library_that_others_may_write_is_not_loaded(copied: list[list[str]], fresh: Path) -> None:
    library = building.built_library()
    library.chmod(0o722)
    building.built_library()
    assert len(copied) == 2
    fresh.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write it"):
        building.built_library()
    assert "others may write it" in unavailable_reason()
    fresh.chmod(0o700)


@pytest.mark.skipif(compiled() is None, reason="no compiler")
def test_a_build_that_failed_is_not_tried_at_each_start(
    copied: list[list[str]], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = subprocess.run

    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "--version" in command:
            return copy(command, **options)
        copied.append(command)
        raise subprocess.CalledProcessError(1, command, stderr="error: no such thing")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        building.built_library()
    for _ in range(3):
        with pytest.raises(OSError, match="no such thing"):
            building.built_library()
    assert len(copied) == 1
    monkeypatch.setattr(building, "FAILED_S", 0.0)
    monkeypatch.setattr(subprocess, "run", copy)
    assert building.built_library().exists()


def test_the_package_contains_the_sources() -> None:
    said = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in said["core"] for path in Path("core").glob(pattern)}
    sources = {path.relative_to(Path.cwd()) for path in building.SOURCES.iterdir()}
    assert any(path.suffix == ".cpp" for path in sources)
    assert sources <= packed


@pytest.mark.parametrize("fault", ["none installed", "refuses the source", "no library", "cache not writable"])
def test_without_a_compiler_the_log_says_so(
    fault: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def build(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        if fault == "refuses the source" and "--version" not in args[0]:  # type: ignore[operator]
            raise subprocess.CalledProcessError(1, "g++", stderr="error: no such thing")
        return subprocess.CompletedProcess((), 0, stdout="")

    if fault == "none installed":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif fault == "cache not writable":
        fresh.write_text("a file where the folder would be")
    else:
        monkeypatch.setattr(subprocess, "run", build)
    with caplog.at_level(logging.WARNING):
        assert compiled() is None
        assert compiled() is None
    (record,) = caplog.records
    assert record.msg == "engine.not_compiled"
    reason = str(record.reason)  # type: ignore[attr-defined]  # an extra
    assert reason == unavailable_reason()
    assert {
        "none installed": "g++",
        "refuses the source": "no such thing",
        "no library": "kernels.so",
        "cache not writable": "kernels",
    }[fault] in reason
