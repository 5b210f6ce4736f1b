"""From examples to batches: token ids, loss on the answer only, length buckets, an order that can be resumed.

Shapes: B rows of T tokens. Ids, masks and labels are int64; a label of IGNORE (-100) asks for nothing.
"""

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.calibration.tokens import control_tokens, literal_ids, pieces_ids, start_ids
from lora_lite.errors import LoraLiteError
from lora_lite.lab.models.chat import History, chat_pieces, render_chat
from lora_lite.lab.tasks.task import Example, Task

IGNORE = -100
MAX_LENGTH = 512


class DataError(LoraLiteError, ValueError):
    """No usable example, a batch that cannot be made, or a tokenizer without an end token; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: the prompt, and the answer with the end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class TokenRecord(TypedDict):
    """A `TokenReport` as records hold it."""

    kept: int
    too_long: int
    empty: int
    prompt_tokens: int
    answer_tokens: int
    max_length: int


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

    def record(self) -> TokenRecord:
        """As plain data."""
        return TokenRecord(**vars(self))

    def __str__(self) -> str:
        return (
            f"{self.kept} examples kept ({self.prompt_tokens} prompt and {self.answer_tokens} answer tokens); "
            f"left out: {self.too_long} longer than {self.max_length} tokens, {self.empty} without prompt or answer"
        )


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, instruction: str = "", chat: bool = True, history: History = ()
) -> str:
    """The text that the model sees before its answer.

    With a chat template: the instruction as system message, the prompt as the user's turn. Templates that refuse or
    skip a system message get both in the user's turn. Without a template: prompt, instruction and a line end.
    chat: False gives the prompt as it stands. Raises ChatTemplateError if a template shows not both.
    history: prompts before this one, with their replies; without a template, each stands before it with a line end.
    """
    if chat and tokenizer.chat_template:
        return render_chat(tokenizer, prompt, instruction, history)

    def plain(each: str) -> str:
        return "\n".join(filter(None, (each, instruction))) + "\n" if chat else each

    return "".join(f"{plain(earlier)}{reply}\n" for earlier, reply in history) + plain(prompt)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example, history: History = ()) -> list[int]:
    """Token ids of an example's prompt, ready for the answer: no end token behind it, whatever the tokenizer adds.

    A chat template writes its own special tokens; an end token that it leaves behind the whole is taken off, for a
    reply does not follow one. Names of special tokens in the example's texts are plain text. history: see
    `render_prompt`.
    """
    text = render_prompt(tokenizer, example.prompt, example.instruction, example.chat, history)
    if not (example.chat and tokenizer.chat_template):
        return start_ids(tokenizer) + literal_ids(tokenizer, text)
    texts = (example.prompt, example.instruction, *itertools.chain.from_iterable(history))
    if any(name in each for name in control_tokens(tokenizer) for each in texts):
        ids = pieces_ids(tokenizer, chat_pieces(tokenizer, example.prompt, example.instruction, history))
    else:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer, without the end token. Tokenised apart from the prompt, as generation will meet it."""
    return literal_ids(tokenizer, answer)


def example_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of an example's prompt and of its answer, without the end token.

    A plain prompt (chat=False) and its answer are tokenised as one text, with a blank between them unless the prompt
    ends in one, and cut where the prompt's own tokens end: some tokenizers read " 12" otherwise when it stands alone.
    Where no cut falls there, the answer is tokenised apart: generation starts from the prompt's tokens as they are.
    """
    prompt = prompt_ids(tokenizer, example)
    if example.chat:
        return prompt, answer_ids(tokenizer, example.answer)
    answer = example.answer if example.prompt[-1:].isspace() else f" {example.answer}"
    joint = start_ids(tokenizer) + literal_ids(tokenizer, example.prompt + answer)
    joined = joint[: len(prompt)] == prompt
    return prompt, joint[len(prompt) :] if joined else answer_ids(tokenizer, answer)


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH
) -> tuple[list[Encoded], TokenReport]:
    """Tokenise examples for training; whole examples only.

    An example longer than max_length tokens, or with an empty prompt or answer, is left out (never cut) and counted in
    the report. Raises DataError if none is left, or if the tokenizer has no end token.
    """
    end = require_end(tokenizer)
    full = [example for example in examples if example.prompt.strip() and example.answer.strip()]
    pairs = [example_ids(tokenizer, example) for example in full]
    items = [Encoded(tuple(prompt), (*answer, end)) for prompt, answer in pairs if answer]
    kept = [item for item in items if len(item) <= max_length]
    prompts, answers = sum(len(item.prompt) for item in kept), sum(len(item.answer) for item in kept)
    too_long, empty = len(items) - len(kept), len(examples) - len(items)
    report = TokenReport(len(kept), too_long, empty, prompts, answers, max_length)
    if not kept:
        raise DataError(f"no example to train on: {_why_none(examples, items, max_length)} ({report})")
    return kept, report


def require_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end token. Raises DataError if there is none: an answer would never end."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no eos_token, so no answer could be taught to end; set tokenizer.eos_token to the token "
            'that ends a turn, or "eos_token" in its tokenizer_config.json'
        )
    return cast(int, tokenizer.eos_token_id)


def _why_none(examples: Sequence[Example], items: Sequence[Encoded], max_length: int) -> str:
    if not examples:
        return "there are no examples; draw some with task.examples('train', n)"
    if not items:
        return f"all {len(examples)} are without prompt or answer; look at the task's fields"
    lengths = sorted(map(len, items))
    return (
        f"all {len(items)} with an answer are longer than max_length {max_length}: from {lengths[0]} to {lengths[-1]} "
        f"tokens, half of them up to {statistics.median_high(lengths)}; raise max_length, or shorten the prompts "
        "(drop=..., chat=False)"
    )


def answer_budget(task: Task, tokenizer: PreTrainedTokenizerBase, sample: int = 128) -> int:
    """How many new tokens an answer may take: the task's own figure, else measured on training answers.

    Measured: a quarter more than the longest of `sample` answers, plus 4 (the end token and some air).
    """
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    examples = itertools.islice(task.distinct("train"), sample)
    longest = max((len(example_ids(tokenizer, example)[1]) for example in examples if example.answer), default=0)
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


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int = 256, count: int = 24) -> list[list[int]]:
    """Token windows of a plain text, for the loss of a language model: `count` of `length` tokens, none overlapping.

    They lie evenly over the text. Each begins with the tokenizer's start token, if it puts one before a text.
    Raises DataError if the text is too short; the message says for how many windows it would do.
    """
    if length < 2 or count < 1:
        raise DataError(f"windows need a length of 2 or more and a count of 1 or more, got {length} and {count}")
    start = start_ids(tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    body = length - len(start)
    there = len(ids) // body if body > 0 else 0
    if there < count:
        raise DataError(
            f"the text has {len(ids)} tokens, enough for {there} windows of {length}, not for {count}; "
            "ask for fewer or shorter windows, or give a longer text"
        )
    places = [index * there // count * body for index in range(count)]
    return [start + ids[place : place + body] for place in places]


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
