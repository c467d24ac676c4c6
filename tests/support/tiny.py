"""Tiny random models and adapters for tests: byte-level tokenizer, two Llama layers, adapters whose B is not zero."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.config.sections import ModelSettings
from core.engine.runtime.loading import load_for_serving
from core.model.base import BaseModel
from core.types import AdapterRef

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte (256), after three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(**changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.4,  # far from uniform, so that greedy answers differ and do not tie
    }
    return LlamaConfig(**{**values, **changes})


def save_tiny(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A whole model folder."""
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_tiny(folder: Path, **changes: Any) -> BaseModel:
    return load_for_serving(ModelSettings(name=str(save_tiny(folder, **changes)), device="cpu"), folder)


def quietly(make: Callable[[], Any]) -> Any:
    """peft 0.21 asks transformers 5.23 for names that it warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make()


def save_adapter(base: BaseModel | Path, folder: Path, *, seed: int, std: float = 0.2, **options: Any) -> AdapterRef:
    """A PEFT adapter of random weights, B included, saved by peft itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    source = base if isinstance(base, Path) else base.folder
    torch.manual_seed(seed)
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}
    plain = AutoModelForCausalLM.from_pretrained(source)
    model = quietly(lambda: get_peft_model(plain, LoraConfig(**{**values, **options})))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return AdapterRef(sha256=digest, folder=folder, label=f"{folder.name}@1")


def edit_config(ref: AdapterRef, **changes: Any) -> None:
    """Write other values into an adapter's adapter_config.json."""
    path = ref.folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def peft_answers(
    base: BaseModel, refs: list[AdapterRef | None], prompts: list[tuple[int, ...]], n: int, attention: str = "sdpa"
) -> list[list[int]]:
    """The oracle: each prompt alone, `set_adapter` + greedy `generate`; None runs the bare base model."""
    with_adapter = peft_model(base, refs, attention)
    answers = []
    for ref, prompt in zip(refs, prompts, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode(), with_adapter(ref) as model:
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=sorted(base.eos_ids),
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def peft_model(
    base: BaseModel, refs: list[AdapterRef | None], attention: str = "sdpa"
) -> Callable[[AdapterRef | None], AbstractContextManager[Any]]:
    """PEFT's model with these adapters: call it with one (None for the bare base) to have it run with that."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.folder, attn_implementation=attention).eval()
    model: Any = None
    for ref in {ref.sha256: ref for ref in refs if ref is not None}.values():
        if model is None:
            options = {"model_id": ref.folder, "adapter_name": ref.sha256}
            model = quietly(partial(PeftModel.from_pretrained, plain, **options)).eval()
        else:
            model.load_adapter(ref.folder, adapter_name=ref.sha256)

    @contextmanager
    def with_adapter(ref: AdapterRef | None) -> Iterator[Any]:
        if ref is not None:
            model.set_adapter(ref.sha256)
            yield model
        elif model is None:
            yield plain
        else:
            with model.disable_adapter():
                yield model

    return with_adapter
