"""Prometheus gets what happened, through a real scrape, and nothing that names a person or quotes one."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from bots import metrics_server
from bots.app import Parts
from core.config.loader import read_config
from core.engine.protocol import Histogram, Request
from core.errors import AppError, BadConfig, EngineError, StorageError
from core.observability import metrics
from core.observability.metrics import Counts, counter, histogram, render
from tests.support.running_service import RunningService, running_service
from tests.support.waiting import DEADLINE_S

LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{{{LABEL}(?:,{LABEL})*\}})? (-?[0-9.e+-]+)")
SECRET_WORD = "aardvark"


def parsed(text: str) -> dict[str, float]:
    """Samples by name and labels; strict about the format, and about our names."""
    assert text.endswith("\n")
    found: dict[str, float] = {}
    family, kind = "", ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            assert family.startswith("distributary_")
        elif line.startswith("# TYPE "):
            assert line.split(" ")[2] == family
            kind = line.split(" ")[3]
            assert kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == family.endswith("_total")
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == family or (kind == "histogram" and match[1].removeprefix(family) in ENDS), line
            assert match[1] + (match[2] or "") not in found, line
            found[match[1] + (match[2] or "")] = float(match[3])
    return found


ENDS = ("_bucket", "_sum", "_count")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@asynccontextmanager
async def scraped(here: RunningService) -> AsyncIterator[str]:
    """The address of the metrics of that service."""
    parts = Parts(
        read_config({}, {}), here.home, here.database, here.engine, here.deliveries, here.training, here.service
    )
    listen = f"127.0.0.1:{free_port()}"
    server = asyncio.create_task(metrics_server.serve(listen, parts.metrics, parts.probe))
    async with asyncio.timeout(DEADLINE_S):
        while not server.done():
            with suppress(OSError):
                (await asyncio.open_connection("127.0.0.1", int(listen.rpartition(":")[2])))[1].close()
                break
            await asyncio.sleep(0.01)
    try:
        yield f"http://{listen}/metrics"
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


async def get(url: str) -> str:
    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            if url.endswith("/metrics"):
                assert answer.headers["Content-Type"] == metrics.CONTENT_TYPE
            return str(answer.read().decode())

    return await asyncio.to_thread(fetch)


def answer(request: Request) -> str | AppError:
    text = request.messages[-1].text
    return EngineError(detail="it broke") if text == "break" else f"three words {text}"


async def test_a_scrape_tells_what_happened(tmp_path: Path) -> None:
    async with running_service(tmp_path, answer) as here, scraped(here) as url:
        await here.ask(SECRET_WORD, conversation="one")
        await here.ask("again", conversation="two")
        await here.ask("break", conversation="three")
        await here.ask("/nonsense", conversation="four")
        await here.service.accept_dead("fake", "bot", "u1", "not json")
        text = await get(url)
        told = parsed(text)
        charged = await here.database.read(lambda tx: tx.one("SELECT sum(gross_nano) AS g FROM ledger"))
    assert told['distributary_replies_total{channel="acme",outcome="delivered"}'] == 2
    assert told['distributary_replies_total{channel="acme",outcome="failed"}'] == 1
    assert told['distributary_replies_total{channel="acme",outcome="refused"}'] == 1
    assert told['distributary_ledger_charges_total{channel="acme"}'] == 2
    assert charged is not None
    assert told['distributary_ledger_gross_total{channel="acme"}'] == pytest.approx(charged["g"] / 1e9)
    assert told['distributary_inbox_messages{state="new"}'] == 0
    assert told['distributary_inbox_dead{outcome="unreadable"}'] == 1
    assert told['distributary_engine_requests_total{outcome="end"}'] == 2
    assert told['distributary_engine_requests_total{outcome="EngineError"}'] == 1
    assert told['distributary_engine_tokens_total{kind="generated"}'] == 6
    assert told["distributary_engine_first_token_seconds_count"] == 2
    assert told["distributary_engine_inter_token_seconds_count"] == 4
    assert told['distributary_engine_inter_token_seconds_bucket{le="+Inf"}'] == 4
    assert told["distributary_orphans_total"] == 0
    assert SECRET_WORD not in text


async def test_what_waits_is_told_with_its_age(tmp_path: Path) -> None:
    now = [1_700_000_000_000]
    async with running_service(tmp_path, clock=lambda: now[0], running=False) as here, scraped(here) as url:
        await here.send("hello")
        now[0] += 42_000
        told = parsed(await get(url))
    assert told['distributary_inbox_messages{state="new"}'] == 1
    assert told["distributary_inbox_oldest_seconds"] == 42


async def test_a_reply_begun_again_after_a_crash_counts_as_a_possible_orphan(tmp_path: Path) -> None:
    async with running_service(tmp_path, running=False) as here:
        await here.send("hello")
        await here.database.write(lambda tx: tx.run("UPDATE inbox SET state = 'running'"))  # and then the kill
    async with running_service(tmp_path) as here, scraped(here) as url:
        await here.settled()
        assert parsed(await get(url))["distributary_orphans_total"] == 1


async def test_readiness_is_a_committed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_service(tmp_path) as here, scraped(here) as url:
        assert await get(url.replace("/metrics", "/readyz")) == "ready\n"
        assert parsed(await get(url))["distributary_store_commit_age_seconds"] < 60

        def stuck(work: object) -> None:
            raise StorageError(detail="disk I/O error")

        monkeypatch.setattr(here.database, "_submit", stuck)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            await get(url.replace("/metrics", "/readyz"))
        monkeypatch.undo()


async def test_other_requests_are_refused_and_a_scrape_never_holds_up_the_loop(tmp_path: Path) -> None:
    async with running_service(tmp_path) as here, scraped(here) as url:
        for path, status in (("/", 404), ("/metrics/", 404)):
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                await get(url.replace("/metrics", path))
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        writer.write(b"POST /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 405")
        writer.close()
        quiet = await asyncio.open_connection("127.0.0.1", int(url.split(":")[2].split("/")[0]))  # says nothing
        assert parsed(await get(url))
        quiet[1].close()


async def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    async with running_service(tmp_path) as here, scraped(here) as url:
        parts = Parts(
            read_config({}, {}), here.home, here.database, here.engine, here.deliveries, here.training, here.service
        )
        listen = url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(BadConfig, match=r"metrics\.listen = '127.*cannot be used"):
            await metrics_server.serve(listen, parts.metrics, parts.probe)


def test_a_histogram_counts_upwards() -> None:
    told = parsed(render([histogram("h_seconds", "h", Histogram((0.1, 1.0), (2, 3, 1), 7.5))]).decode())
    assert sorted(told.values()) == [2, 5, 6, 6, 7.5]


def test_labels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LABELS", 3)
    counts = Counts("channel", "outcome")
    for i in range(10):
        counts.add(f"c{i}", "delivered")
    counts.add("c0", "delivered")
    told = parsed(render([counter("x_total", "x", *counts.samples())]).decode())
    assert len(told) == 4
    assert told['distributary_x_total{channel="other",outcome="delivered"}'] == 7
    assert told['distributary_x_total{channel="c0",outcome="delivered"}'] == 2
