"""Replies as they come: one prompt, one coefficient, greedy or sampled, until an end token or a stop.

Each coefficient has a decode of its own: what it says does not depend on which others were asked for, and c = 0 is to
the bit what the base says.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import lora_lite as ll
from lora_lite.batches import eval_mode
from lora_lite.calibration.tokens import decode
from lora_lite.lab.errors import RunError
from lora_lite.lab.training.evaluate import cut_at, no_defaults, stop_ids
from lora_lite.lab.training.limits import require_rows

LOWEST_TEMPERATURE = 0.01  # below it, logits divided by it leave fp16's range


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. temperature: 0 takes the likeliest token, more samples. seed: of the samples."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be an integer >= 1")
        if not (self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy), or {LOWEST_TEMPERATURE} or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}: must be an integer >= 0")


@dataclass(frozen=True)
class Reply:
    """What was said at a coefficient: text without special tokens, and number of tokens.

    cut_off: it took all tokens that it was given, and had not ended. stopped: the user stopped it.
    """

    c: float
    text: str
    tokens: int
    cut_off: bool = False
    stopped: bool = False


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    c: float,
    decoding: Decoding,
    write: Callable[[str], object] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Reply:
    """Reply to a tokenised prompt.

    Of the model's generation config only its end tokens count. The global random generator is as before afterwards.

    Args:
        model: with the adapter attached, whose coefficient is c.
        tokenizer: of the model.
        ids: the prompt's tokens.
        c: the coefficient.
        decoding: how tokens are chosen.
        write: is given each part of the text as soon as no later token can change it.
        stop: asked after each token; True ends the reply.

    Raises:
        RunError: the model's logits are not numbers. DataError: a token that the model has no embedding for.
    """
    require_rows(model, max(ids))
    stops = stop_ids(model, tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens, use_cache=True, eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id, **sampling,
    )  # fmt: skip
    text = _Text(tokenizer, stops, write)
    stopping = _Stopping(stop)
    device = model.device
    prompt = torch.tensor([list(ids)], device=device)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        eval_mode(model),
        no_defaults(model),
        torch.no_grad(),
        ll.scale(model, c),
    ):
        torch.manual_seed(decoding.seed)
        model.generate(  # pyright: ignore
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=cast(Any, text),
            logits_processor=LogitsProcessorList([_Numbers(c)]),
            stopping_criteria=StoppingCriteriaList([stopping]),
        )
    cut_off = len(text.ids) >= decoding.max_new_tokens and not stopping.stopped
    return Reply(c, text.shown, len(text.ids), cut_off, stopping.stopped)


class _Text(BaseStreamer):
    """Tokens to text, each part written once it is final.

    transformers' TextStreamer forgets the tokens before a line end, and with them whether a blank leads the next line;
    it shows end tokens that are not special ones too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: set[int], write: Callable[[str], object]) -> None:
        self.tokenizer, self.stops, self.write = tokenizer, stops, write
        self.ids: list[int] = []
        self.shown = ""
        self.prompted = self.ended = False

    def put(self, value: Tensor) -> None:
        if not self.prompted:  # the first call brings the prompt
            self.prompted = True
            return
        told = value.flatten().tolist()
        kept = [] if self.ended else cut_at(told, self.stops)
        self.ended |= len(kept) < len(told)
        self.ids += kept
        # A replacement character at the end may be the beginning of a letter that takes several tokens.
        self._show(decode(self.tokenizer, self.ids).rstrip("\ufffd"))

    def end(self) -> None:
        self._show(decode(self.tokenizer, self.ids))

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.write(text[len(self.shown) :])
            self.shown = text


class _Stopping(StoppingCriteria):
    """Ends a reply that the user stops."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop, self.stopped = stop, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.stopped = self.stopped or self.stop()
        return torch.full((input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device)


class _Numbers(LogitsProcessor):
    """Refuses logits that are not numbers, of which the likeliest would be any token."""

    def __init__(self, c: float) -> None:
        self.c = c

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        if bool(torch.isnan(scores).any()) or bool(torch.isposinf(scores).any()):
            raise RunError(
                f"at c = {self.c:g} the model's outputs are beyond what numbers of its dtype hold: give a smaller "
                "coefficient, or --dtype float32"
            )
        return scores
