"""The real vLLM in its own environment, with the demo model and adapters loaded at run time."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from core.engine.openai.remote import RemoteEngine
from core.types import AdapterRef
from tests.bench.environments import vllm_cpu
from tests.support.engine_contract import Subject, remote

START_S = 900  # on a machine that does other things too
RANK = 8
PATIENT = {"first_token_s": 300.0, "next_token_s": 120.0}  # two cores, and others work on them


@dataclass
class Vllm:
    url: str
    folder: Path

    async def running(self) -> int:
        """vllm:num_requests_running, summed."""
        text = await asyncio.to_thread(self.metrics)
        return round(sum(float(n) for n in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)))

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def subject(self, adapters: list[AdapterRef]) -> Subject:
        def make(**settings: object) -> RemoteEngine:
            return remote(self.url, self.folder, **PATIENT, **settings)

        return Subject("vllm", make, adapters, self.running)


@contextmanager
def running(folder: Path, logs: Path) -> Iterator[Vllm]:
    """The server, healthy. Raises Missing if its environment cannot be built."""
    python = vllm_cpu()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--max-num-batched-tokens", "512"),
        *("--max-num-seqs", "16", "--enable-lora", "--max-loras", "4", "--max-lora-rank", str(RANK)),
        "--enable-prompt-tokens-details",
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    url = f"http://127.0.0.1:{port}"
    with (logs / "vllm.log").open("wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
    try:
        _wait(server, url, logs / "vllm.log")
        yield Vllm(url, folder)
    finally:
        server.terminate()
        server.wait(60)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        if server.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"vLLM did not start: {log.read_text('utf-8', 'replace')[-3000:]}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
