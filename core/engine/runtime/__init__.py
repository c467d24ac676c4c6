"""The model thread of the local engine.

loop.py                    ModelThread: one step after another; entry point of the package
running_batch.py           rows of the batch: admission, preemption, prefix reuse, retry after a failed pass
runner.py                  Runner: forward passes over KV slots and adapters
fused.py attention.py      forward pass of llama-like models; attention over KV slots for any other
compiled_layers.py         the same layers in one call of the compiled kernels (CPU)
cuda_graphs.py             decode steps captured as CUDA graphs
kv_cache.py prefix_cache.py   KV slots of running rows; prefixes kept between turns
sampling.py roofline.py loading.py   logits to ids; bytes and bandwidth; a model prepared for serving

Imports core.engine.{protocol, scheduling, lora, cpu}, core.model.
"""
