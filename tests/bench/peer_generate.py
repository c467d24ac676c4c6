"""transformers' `generate`: one static batch, greedy."""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM

from tests.bench.worker import Case, Spec, serve


def make(spec: Spec):
    torch.set_num_threads(spec.threads)
    model = AutoModelForCausalLM.from_pretrained(spec.folder, dtype=torch.float32).eval()

    def run(case: Case) -> dict[str, float]:
        ids = torch.tensor(spec.prompts[: case["rows"]])
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=spec.new_tokens,
                min_new_tokens=spec.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - began
        assert out.shape[1] == ids.shape[1] + spec.new_tokens
        return {"seconds": seconds}

    return run


if __name__ == "__main__":
    serve(make)
