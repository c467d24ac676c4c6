"""A strict fake of an OpenAI-compatible server with run-time LoRA loading, as vLLM 0.32 behaves."""

from tests.fakes.openai.server import FakeOpenAI as FakeOpenAI
