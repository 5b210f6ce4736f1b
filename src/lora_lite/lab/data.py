"""From examples to batches: token ids, loss on the answer only, length buckets, an order that can be resumed.

Shapes: B rows of T tokens. Ids, masks and labels are int64; a label of IGNORE (-100) asks for nothing.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.errors import LoraLiteError
from lora_lite.lab.tasks import Example, Task

IGNORE = -100
MAX_LENGTH = 512


class DataError(LoraLiteError, ValueError):
    """No usable example, or a batch that cannot be made; the message says what was left out and why."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: the prompt, and the answer with the end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class TokenReport:
    """What became of the examples: kept, left out because too long or without answer, and the kept tokens."""

    kept: int
    too_long: int
    empty: int
    prompt_tokens: int
    answer_tokens: int
    max_length: int

    @property
    def left_out(self) -> int:
        return self.too_long + self.empty

    def __str__(self) -> str:
        return (
            f"{self.kept} examples kept ({self.prompt_tokens} prompt and {self.answer_tokens} answer tokens); "
            f"left out: {self.too_long} longer than {self.max_length} tokens, {self.empty} without prompt or answer"
        )


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, instruction: str = "") -> str:
    """The text that the model sees before its answer.

    With a chat template: the instruction as system message, the prompt as the user's turn. Templates that refuse a
    system message get both in the user's turn. Without a template: instruction, prompt and a line end.
    """
    joined = "\n".join(filter(None, (prompt, instruction)))
    if not tokenizer.chat_template:
        return f"{joined}\n"
    user = {"role": "user", "content": prompt}
    conversation = [{"role": "system", "content": instruction}, user] if instruction else [user]
    try:
        return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))
    except TemplateError:
        conversation = [{"role": "user", "content": joined}]
        return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Token ids of an example's prompt, ready for the answer. A chat template writes its own special tokens."""
    text = render_prompt(tokenizer, example.prompt, example.instruction)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer, without the end token. Tokenised apart from the prompt, as generation will meet it."""
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH
) -> tuple[list[Encoded], TokenReport]:
    """Tokenise examples for training; whole examples only.

    An example longer than max_length tokens, or with an empty prompt or answer, is left out (never cut) and counted in
    the report. Raises DataError if none is left.
    """
    kept: list[Encoded] = []
    too_long = empty = 0
    end = cast(int, tokenizer.eos_token_id)
    for example in examples:
        answer = answer_ids(tokenizer, example.answer)
        if not example.prompt.strip() or not example.answer.strip() or not answer:
            empty += 1
            continue
        item = Encoded(tuple(prompt_ids(tokenizer, example)), (*answer, end))
        if len(item) > max_length:
            too_long += 1
            continue
        kept.append(item)
    prompts, answers = sum(len(item.prompt) for item in kept), sum(len(item.answer) for item in kept)
    report = TokenReport(len(kept), too_long, empty, prompts, answers, max_length)
    if not kept:
        raise DataError(f"no example to train on: {report}; raise max_length, or look at the task's answers")
    return kept, report


def answer_budget(task: Task, tokenizer: PreTrainedTokenizerBase, sample: int = 128) -> int:
    """How many new tokens an answer may take: the task's own figure, else measured on training answers.

    Measured: a quarter more than the longest of `sample` answers, plus 4 (the end token and some air).
    """
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    answers = (example.answer for example, _ in zip(task.distinct("train"), range(sample), strict=False))
    longest = max((len(answer_ids(tokenizer, answer)) for answer in answers), default=0)
    if longest == 0:
        raise DataError(f"the task {task.name!r} has no training answer to measure; give it max_new_tokens")
    return math.ceil(longest * 1.25) + 4


def collate(items: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """A training batch, padded on the right: input_ids, attention_mask and labels, each (B, T)."""
    if not items:
        raise DataError("a batch needs at least one example")
    width = max(map(len, items))
    ids = torch.full((len(items), width), pad)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        start, end = len(item.prompt), len(item)
        ids[row, :end] = torch.tensor(item.prompt + item.answer)
        labels[row, start:end] = ids[row, start:end]
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """A generation batch, padded on the left so that every row ends where its answer starts: two (B, T) tensors."""
    if not prompts or not all(prompts):
        raise DataError("a generation batch needs at least one prompt, and no empty one")
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def answer_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Mean cross-entropy over the answer tokens of a `collate` batch, and how many there were.

    The output layer runs only at positions that some row is asked about: with a vocabulary of 49 thousand it is a fifth
    of a small model's work. The model must know `logits_to_keep` (the causal models of transformers do).
    """
    labels = batch["labels"]
    asked = (labels[:, 1:] != IGNORE).any(dim=0).nonzero().squeeze(1)  # position t answers for label t + 1
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, logits_to_keep=asked, use_cache=False).logits
    targets = labels[:, asked + 1]
    # fp32: a mean over thousands of bf16 exponentials would lose the last digits that training lives on
    loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    return loss, int((targets != IGNORE).sum())


class BatchOrder:
    """Which examples make up batch k: a function of (seed, k) alone, so training resumes at any step without replay.

    Each epoch shuffles all examples, sorts within windows of `window` batches, so that a batch holds similar lengths
    and little padding, and shuffles the batches. Every example comes once an epoch; the last batch may be smaller.
    lengths: tokens of each example. batch(k): indices of its examples.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, window: int = 8) -> None:
        if not lengths or batch_size < 1 or window < 1:
            raise DataError(
                f"a batch order needs examples and sizes of 1 or more: {len(lengths)} examples, "
                f"batch_size {batch_size}, window {window}"
            )
        self.lengths = tuple(lengths)
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self.batches_per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch: tuple[int, list[list[int]]] | None = None

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of batch `step` (0, 1, ...; it runs on into the next epochs)."""
        if step < 0:
            raise DataError(f"steps count from 0, got {step}")
        epoch, place = divmod(step, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan(epoch))
        return self._epoch[1][place]

    def _plan(self, epoch: int) -> list[list[int]]:
        # A string seeds Python's generator through SHA-512: the same on every machine and version.
        generator = random.Random(f"batch order {self.seed} {epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        width = self.batch_size * self.window
        batches = []
        for start in range(0, len(order), width):
            bucket = sorted(order[start : start + width], key=lambda index: self.lengths[index])
            batches += [bucket[at : at + self.batch_size] for at in range(0, len(bucket), self.batch_size)]
        generator.shuffle(batches)
        return batches
