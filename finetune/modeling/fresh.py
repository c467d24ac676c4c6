"""A new model: a Llama configuration of a given size with weights drawn from the seed, written as a model folder."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from core import files
from core.jobs.protocol import Spec
from finetune.modeling.base import load_tokenizer

FOLDER = "base"
END, TURN, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def fresh_base(job_folder: Path, spec: Spec, texts: Iterable[str]) -> Path:
    """JOBDIR/base, created if missing; its own tokenizer (fresh.vocabulary) is trained on `texts`. Raises JobError."""
    folder = job_folder / FOLDER
    if folder.is_dir():
        return folder
    aside = job_folder / f"{FOLDER}.new"
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer = (
        new_tokenizer(texts, spec.fresh.vocabulary)
        if spec.fresh.vocabulary
        else load_tokenizer(job_folder / spec.model)
    )
    tokenizer.save_pretrained(aside)
    _draw(spec, tokenizer).save_pretrained(aside)
    (aside / "fresh.json").write_text(json.dumps({**asdict(spec.fresh), "seed": spec.hyper.seed}) + "\n")
    files.move(aside, folder)
    return folder


def new_tokenizer(texts: Iterable[str], size: int) -> Any:
    """Byte-level BPE of at most `size` tokens with a ChatML template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    control = [END, TURN, TURN_ENDS]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, vocab_size=size, min_frequency=2, show_progress=False, special_tokens=control)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, bos_token=END, eos_token=TURN_ENDS, pad_token=END,
        additional_special_tokens=[TURN],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _draw(spec: Spec, tokenizer: Any) -> Any:
    """Llama's architecture, which every engine serves, with its feed-forward width of 8/3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fresh = spec.fresh
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=fresh.hidden,
        intermediate_size=-(-fresh.hidden * 8 // 3 // 16) * 16,
        num_hidden_layers=fresh.layers,
        num_attention_heads=fresh.heads,
        num_key_value_heads=fresh.heads,
        max_position_embeddings=fresh.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(spec.hyper.seed)
    return LlamaForCausalLM(config)
