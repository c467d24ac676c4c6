"""Generates replies: a request goes in, a stream of events comes out.

protocol.py         Engine, Request and the events; every engine implements it
plugins.py          finds an engine by the name in `engine.kind` (entry point group `distributary.engines`)
local.py            LocalEngine: the model in this process
scripted.py         ScriptedEngine: answers from a table, for tests
openai/             RemoteEngine: an OpenAI-compatible server
scheduling/         open requests, fair admission, detokenizing, statistics
runtime/            the model thread: batches, forward passes, KV cache, sampling
lora/ cpu/          adapters in a mixed batch; compiled kernels and int8 for the CPU
diagnostics/        parity check at load, benchmark

Imports core.model, core.config, core.types, core.errors and core.i18n. Inside: protocol <- cpu <- lora <- scheduling
<- runtime <- diagnostics <- local; openai stands on scheduling.
"""
