"""A dialogue: questions and replies, at one coefficient or several, which share one history."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.lab.talking.prompts import PromptForm, fitted
from lora_lite.lab.talking.replies import Decoding, Reply, reply


def coefficients(text: str) -> tuple[float, ...]:
    """The coefficients that a text such as "-1,0,0.5" names. Raises ValueError for any other."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise ValueError(f"c = {text!r}: give a number, or several with commas between them, such as -1,0,1")
    return found


@dataclass
class Dialogue:
    """What was said, and how it goes on. The next prompt follows the replies at the first coefficient."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    form: PromptForm
    cs: tuple[float, ...]
    decoding: Decoding
    history: list[tuple[str, str]] = field(default_factory=list)
    turns: int = 0

    def prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids of the question after the history, and how many of the oldest turns had no room and are forgotten.

        Raises RunError, ChatTemplateError: see `fitted`.
        """
        ids, kept = fitted(self.model, self.tokenizer, self.form, question, self.history, self.decoding.max_new_tokens)
        forgotten = len(self.history) - len(kept)
        self.history = list(kept)
        return ids, forgotten

    def reply(self, ids: list[int], c: float, write: Callable[[str], Any], stop: Callable[[], bool]) -> Reply:
        """The reply at a coefficient. Samples of one turn have the same seed at every coefficient; turns differ."""
        decoding = dataclasses.replace(self.decoding, seed=self.decoding.seed + self.turns)
        return reply(self.model, self.tokenizer, ids, c, decoding, write, stop)

    def remember(self, question: str, said: Reply) -> None:
        """Take a turn into the history, unless nothing was said before it was stopped."""
        self.turns += 1
        if said.text or not said.stopped:
            self.history.append((question, said.text))

    def reset(self) -> None:
        """Forget what was said."""
        self.history, self.turns = [], 0


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only makes the function that is given return True; the second raises KeyboardInterrupt.

    In the main thread alone, as all of Python's handlers of signals.
    """
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
