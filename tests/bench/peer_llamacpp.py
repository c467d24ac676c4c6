"""llama.cpp on the Q4_1 file, all rows as sequences of one batch, greedy. Run by its own environment's Python.

Its kernels for AMX end some processes with SIGILL (0.3.36, in a virtual machine). Where that is so, it runs without
them, which is its parameter `use_extra_bufts`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import llama_cpp as ll
import numpy as np

from tests.bench.worker import Case, Spec, serve

CONTEXT = 160  # tokens of one row


def make(spec: Spec):
    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    params.use_extra_bufts = "TRYING" in os.environ or _survives()
    model = ll.llama_model_load_from_file(spec.gguf.encode(), params)
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))

    def decode(context, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, row, wanted) each -> the likeliest next token of the wanted ones."""
        batch = ll.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        assert ll.llama_decode(context, batch) == 0
        ids = []
        for i, token in enumerate(tokens):
            if token[3]:
                ids.append(int(np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (vocab,)).argmax()))
        ll.llama_batch_free(batch)
        return ids

    def run(case: Case) -> dict[str, float]:
        rows = case["rows"]
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * rows, rows
        params.n_batch = params.n_ubatch = 2048
        params.n_threads = params.n_threads_batch = spec.threads
        context = ll.llama_init_from_model(model, params)
        began = time.perf_counter()
        prompts = spec.prompts[:rows]
        last = []
        step = 2048 // len(prompts[0])
        for first in range(0, rows, step):
            chunk = [
                (token, position, row, position == len(prompts[row]) - 1)
                for row in range(first, min(first + step, rows))
                for position, token in enumerate(prompts[row])
            ]
            last += decode(context, chunk)
        for i in range(spec.new_tokens - 1):
            last = decode(context, [(token, len(prompts[row]) + i, row, True) for row, token in enumerate(last)])
        seconds = time.perf_counter() - began
        ll.llama_free(context)
        return {"seconds": seconds}

    return run


def _survives() -> bool:
    """Whether a process like this one, with all its kernels, lives through a prompt."""
    command = [sys.executable, "-m", "tests.bench.peer_llamacpp", *sys.argv[1:]]
    case = '{"rows": 1, "adapters": 0}\n'
    return not subprocess.run(
        command, input=case.encode(), env={**os.environ, "TRYING": "1"}, capture_output=True
    ).returncode


if __name__ == "__main__":
    serve(make)
