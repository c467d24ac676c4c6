"""The engine over an OpenAI-compatible server (vLLM).

remote.py            RemoteEngine; entry point of the package
request_builder.py   renders prompts, salts prefixes, loads adapters into the server
client.py            OpenAIServer: HTTP, retries, errors
sse.py               request and response format, server-sent events
preflight.py         checks at start that the server serves our base model

Imports core.engine.{protocol, scheduling}, core.model, core.config. Only client.py knows HTTP.
"""
