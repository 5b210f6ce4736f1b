"""Held-out evaluation: batched greedy generation, scored by the task's own verifier."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.batches import eval_mode
from lora_lite.calibration.tokens import decode
from lora_lite.errors import LoraLiteError
from lora_lite.lab.scoring.scoring import RIGHT
from lora_lite.lab.tasks.task import Example, Task
from lora_lite.lab.training.data import (
    Encoded,
    answer_budget,
    answer_loss,
    collate,
    left_pad,
    prompt_ids,
)
from lora_lite.lab.training.limits import require_fit
from lora_lite.printable import one_line

# Generation of one token reads every weight once whatever the number of rows: on 2 CPU cores 64 rows gave 3.5 times the
# tokens per second of 8.
BATCH_SIZE = 64
LOSS_BATCH_SIZE = 8


class EvaluationError(LoraLiteError, ValueError):
    """There is nothing to evaluate, or the model cannot generate."""


@dataclass(frozen=True)
class Record:
    """One evaluated item.

    score: the verifier's, in [0, 1]. mentioned: the completion is right, or has the answer anywhere in it; see `judge`.
    cut_off: the completion took all tokens that it was given, and had not ended. failure: why the verifier could give
    the completion no score, which counts as 0; "" where it could.
    """

    prompt: str
    answer: str
    completion: str
    score: float
    mentioned: bool
    cut_off: bool = False
    failure: str = ""

    @property
    def correct(self) -> bool:
        return self.score >= RIGHT


@dataclass(frozen=True)
class Evaluation:
    """Records in the order of the examples, and what they sum up to.

    accuracy counts only items with the full score: several verifiers give part of it to an answer inside other text.
    mean_score is the mean with those parts; mention_rate ignores the format altogether: a base that knows the answers
    but not the format has a high mention_rate and a low accuracy, so the three together say what an adapter taught.
    """

    records: tuple[Record, ...]
    seconds: float
    new_tokens: int

    @property
    def accuracy(self) -> float:
        return sum(record.correct for record in self.records) / len(self.records)

    @property
    def mean_score(self) -> float:
        return sum(record.score for record in self.records) / len(self.records)

    @property
    def mention_rate(self) -> float:
        return sum(record.mentioned for record in self.records) / len(self.records)

    @property
    def cut_off(self) -> float:
        """Share of completions that had not ended after all their tokens: a larger max_new_tokens may help."""
        return sum(record.cut_off for record in self.records) / len(self.records)

    @property
    def failures(self) -> int:
        """Number of completions that the verifier could give no score. They count as wrong."""
        return sum(bool(record.failure) for record in self.records)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Answer every example greedily and score the completions.

    max_new_tokens: None takes `answer_budget`, the task's own figure or one measured on training answers.
    The model's train or eval mode is as before when this returns or raises.
    Raises EvaluationError if there are no examples, or sizes below 1.
    """
    if not examples:
        raise EvaluationError(f"no examples of {task.name!r} to evaluate; draw some with task.examples('test', n)")
    budget = answer_budget(task, tokenizer) if max_new_tokens is None else max_new_tokens
    start = time.perf_counter()
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    title = one_line(f"evaluate {task.name}") if progress else None
    completions = generate(model, tokenizer, prompts, budget, batch_size, title)
    records = []
    for example, (text, count) in zip(examples, completions, strict=True):
        records.append(record_of(task, example, text, count >= budget))
    return Evaluation(tuple(records), time.perf_counter() - start, sum(count for _, count in completions))


def record_of(task: Task, example: Example, completion: str, cut_off: bool = False) -> Record:
    """A completion's score, and whether it is right or has the answer anywhere in it, by the task's own `mention`.

    Both follow from the arguments alone. What has the full score counts as mentioned, so that a mention rate is never
    below the accuracy.
    """
    score, failure = task.assess(example, completion)
    mentioned = score >= RIGHT or task.mention(example, completion)
    return Record(example.prompt, example.answer, completion, score, mentioned, cut_off, failure)


def judge(task: Task, example: Example, completion: str) -> tuple[float, bool]:
    """The score and the mention of `record_of`."""
    record = record_of(task, example, completion)
    return record.score, record.mentioned


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    progress: str | None = None,
) -> list[tuple[str, int]]:
    """Greedy completions of tokenised prompts, in their order: text without special tokens, and number of new tokens.

    Each token is the one with the largest logit. Of the model's generation config only its end tokens count: beams,
    penalties, suppressed tokens, smallest lengths and the like stay out. A completion ends at the tokenizer's end token
    or at one of the model's own. progress: title of a progress bar.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise EvaluationError(f"batch_size and max_new_tokens are 1 or more, got {batch_size} and {max_new_tokens}")
    require_fit(model, prompts, "the longest prompt with its reply", max_new_tokens)
    stops = stop_ids(model, tokenizer)
    if not stops:
        raise EvaluationError(
            "neither the tokenizer nor the model's generation config has an end token, so no completion would end; "
            "set tokenizer.eos_token to the token that ends a turn"
        )
    pad = min(stops) if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=sorted(stops), pad_token_id=pad
    )
    results: list[tuple[str, int]] = [("", 0)] * len(prompts)
    with (
        eval_mode(model),
        no_defaults(model),
        torch.no_grad(),
        tqdm(total=len(prompts), desc=progress, disable=progress is None) as bar,
    ):
        for batch in length_batches([len(prompt) for prompt in prompts], batch_size):
            inputs = left_pad([prompts[index] for index in batch], pad)
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            output = cast(torch.Tensor, model.generate(**inputs, generation_config=config))  # pyright: ignore
            for index, row in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                ids = cut_at(row, stops)
                results[index] = (decode(tokenizer, ids), len(ids))
            bar.update(len(batch))
    return results


def answer_loss_of(
    model: PreTrainedModel, items: Sequence[Encoded], pad: int, batch_size: int = LOSS_BATCH_SIZE
) -> float:
    """Mean loss over all answer tokens of `items`, in nats a token; every token weighs the same.

    The model's train or eval mode is as before when this returns or raises. Raises EvaluationError if there are no
    items, or a size below 1.
    """
    if not items or batch_size < 1:
        raise EvaluationError(f"a loss needs items and a batch_size of 1 or more, got {len(items)} and {batch_size}")
    require_fit(model, items, "the longest text")
    total, tokens = 0.0, 0
    with eval_mode(model), torch.no_grad():
        for batch in length_batches([len(item) for item in items], batch_size):
            inputs = collate([items[index] for index in batch], pad)
            loss, count = answer_loss(model, {key: value.to(model.device) for key, value in inputs.items()})
            total += float(loss) * count
            tokens += count
    return total / tokens


def text_loss(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], batch_size: int = LOSS_BATCH_SIZE // 2
) -> float:
    """Mean loss of a language model over plain text, in nats a token: each token of a window but the first is asked.

    windows: token ids, as `data.text_windows` gives them. Modes and errors: see `answer_loss_of`.
    """
    if any(len(ids) < 2 for ids in windows):
        raise EvaluationError("a window of text needs two tokens or more: the first is read, the others are asked")
    # Windows of different lengths are padded, with any token: the mask hides it.
    return answer_loss_of(model, [Encoded(tuple(ids[:1]), tuple(ids[1:])) for ids in windows], 0, batch_size)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: running out of memory then shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return (order[at : at + batch_size] for at in range(0, len(order), batch_size))


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation config (none, one or more)."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    return {int(token) for token in (tokenizer.eos_token_id, *listed) if isinstance(token, int)}


def cut_at(ids: Iterable[int], stops: set[int]) -> list[int]:
    """Ids up to the first stop token, without it."""
    kept: list[int] = []
    for token in ids:
        if token in stops:
            break
        kept.append(token)
    return kept


@contextmanager
def no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Take the model's generation config away, and put it back afterwards.

    transformers fills whatever the config of a call leaves open from the model's own, entry by entry: there is no list
    of entries to set to "off" that the next version does not outgrow.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
