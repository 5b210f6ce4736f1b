"""Two labelled sets of prompts, whose difference is a direction."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lite.calibration.tokens import rendered_ids
from lora_lite.errors import CalibrationError


@dataclass(frozen=True)
class Contrast:
    """Calibration data for contrastive steering: what to push towards, and away from.

    Args:
        positive, negative: lists of prompts (strings, with a `tokenizer`), or batches as for `attach`; the same number
            of prompts in each.
        tokenizer: a transformers tokenizer, for strings. Chat-rendered prompts may begin with its start token, which
            is not put there twice; an end token that it would add is left out, for prompts go on.
        batch_size: prompts in a batch, for strings; 1 where the tokenizer has no padding token.

    Raises:
        CalibrationError: an empty set, sets of unequal size or with the same prompts, strings without a tokenizer.
    """

    positive: Iterable[Any]
    negative: Iterable[Any]
    tokenizer: Any = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise CalibrationError(f"Contrast.{name} is one string: give a list of prompts")
            object.__setattr__(self, name, list(value))
            if not getattr(self, name):
                raise CalibrationError(f"Contrast.{name} is empty: give at least one prompt")
        texts = [isinstance(each, str) for each in [*self.positive, *self.negative]]
        if any(texts) and (self.tokenizer is None or not all(texts)):
            raise CalibrationError("Contrast: prompts as strings need a tokenizer, and both sets must be strings")
        if all(texts):
            self._check_prompts(list(self.positive), list(self.negative))

    @staticmethod
    def _check_prompts(positive: Sequence[str], negative: Sequence[str]) -> None:
        if len(positive) != len(negative):
            raise CalibrationError(
                f"Contrast: {len(positive)} positive and {len(negative)} negative prompts; give the same number of each"
            )
        if sorted(positive) == sorted(negative):
            raise CalibrationError("Contrast: the positive and the negative prompts are the same")

    def labelled(self) -> Iterator[tuple[bool, Any]]:
        """(whether positive, batch), one by one."""
        for label, items in ((True, list(self.positive)), (False, list(self.negative))):
            if isinstance(items[0], str):
                size = self.batch_size if getattr(self.tokenizer, "pad_token_id", None) is not None else 1
                for start in range(0, len(items), size):
                    encoded = self._tokens(items[start : start + size], size > 1)
                    yield label, {key: encoded[key] for key in ("input_ids", "attention_mask") if key in encoded}
            else:
                for batch in items:
                    yield label, batch

    def _tokens(self, prompts: list[str], padding: bool) -> Any:
        if not hasattr(self.tokenizer, "pad"):  # any callable that makes batches
            return self.tokenizer(prompts, return_tensors="pt", padding=padding)
        ids = [rendered_ids(self.tokenizer, prompt) for prompt in prompts]
        return self.tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding=padding)

    def __iter__(self) -> Iterator[Any]:
        """The batches of both sets, for methods that want any data."""
        return (batch for _, batch in self.labelled())

    def __len__(self) -> int:
        return sum(1 for _ in self.labelled())
