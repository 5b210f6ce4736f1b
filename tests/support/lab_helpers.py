"""A byte-level tokenizer, a tiny Llama and small data files, made here: no network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_lite.lab.studies.study import Study
from lora_lite.lab.training.progress import TrainConfig

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(
    chat: str | None = CHAT, eos: str | None = "<eos>", pad: str | None = "<pad>"
) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0-255), then <eos> 256 and <pad> 257."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = chat
    return tokenizer


def make_llama(cls: type[LlamaForCausalLM] = LlamaForCausalLM, vocab_size: int = 258) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=None,  # the tokenizer knows it
    )
    torch.manual_seed(0)
    return cls(config).eval()


def save_tiny(folder: Path, vocab_size: int = 258, **tokens: str | None) -> str:
    """A tiny model with its tokenizer in a folder; gives the folder's name."""
    make_llama(vocab_size=vocab_size).save_pretrained(folder)
    make_tokenizer(**tokens).save_pretrained(folder)
    return str(folder)


SMALL: dict[str, Any] = {
    "methods": ("lora,ia3",), "task": "gcd", "validation_examples": 4, "test_examples": 6, "seeds": 2, "rates": 3,
    "rate_factor": 10.0, "general_windows": 2, "window_tokens": 16, "other_examples": 2, "other_task": "chain_sum",
    "max_new_tokens": 4, "costs": False,
}  # fmt: skip


def small_study(model: str, **changes: Any) -> Study:
    """A study of seconds on a tiny model."""
    training = TrainConfig(**{"steps": 2, "batch_size": 2, **changes.pop("training", {})})
    return Study(**{**SMALL, "model": model, "training": training, **changes})


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
