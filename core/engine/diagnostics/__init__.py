"""Measures and checks an engine.

parity.py      check_parity: at load, the engine's logits against the model's own
benchmark.py   measure: tokens per second and latencies through the protocol (`distributary benchmark`)

Imports core.engine.{protocol, lora, cpu, runtime} and core.model.
"""
