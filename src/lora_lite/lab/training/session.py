"""What training, studies and the probe work on: a base and the examples of a task, opened once.

data = draw("gcd", {"train": 256, "test": 64})  # what is wrong with the task shows before the model is read
session = Session.open(Base.of(run), data)
session.attach_and_train([ll.LoRAConfig()], TrainConfig())
session.answers().accuracy
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lora_lite as ll
from lora_lite.lab.models.base import Base
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.task import Example, Task, fingerprint, require_sound_key
from lora_lite.lab.training.config import CALIBRATION_BATCHES, needs_data
from lora_lite.lab.training.data import MAX_LENGTH, Encoded, TokenReport, collate, encode
from lora_lite.lab.training.evaluate import Evaluation, evaluate
from lora_lite.lab.training.loop import train
from lora_lite.lab.training.progress import Progress, TrainConfig

HELD_OUT_SEED = 0  # whatever seed trains, it is measured on the same items
ANSWERED = "test"  # the split that the model answers; it learns from, or takes the loss on, the others


@dataclass(frozen=True)
class Data:
    """Examples of a task, drawn.

    Attributes:
        examples: by split, "train", "validation", "test".
        few: a sentence for each split that has fewer than were asked for.
    """

    task: Task
    examples: dict[str, list[Example]]
    few: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside every number."""
        return [*self.task.notes, *self.few]

    @property
    def fingerprints(self) -> dict[str, str]:
        """By split: 16 hex digits."""
        return {split: fingerprint(examples) for split, examples in self.examples.items()}

    @property
    def counts(self) -> dict[str, int]:
        """By split: how many examples."""
        return {split: len(examples) for split, examples in self.examples.items()}


def draw(task: str, sizes: Mapping[str, int], seed: int = 0) -> Data:
    """Draw examples of a task, as `load_task` reads its name.

    sizes: split -> how many are asked for; all that there are where it has fewer. seed: of the training examples.
    Raises `TaskError` for a task that cannot be made, a split without examples, held-out answers that are wrong.
    """
    made = load_task(task)
    examples: dict[str, list[Example]] = {}
    few: tuple[str, ...] = ()
    for split, size in sizes.items():
        drawn, notes = made.parts({split: size}, seed if split == "train" else HELD_OUT_SEED)
        examples |= drawn
        few += notes
    for split, drawn in examples.items():
        if split != "train":
            require_sound_key(made, drawn)
    return Data(made, examples, few)


@dataclass(frozen=True)
class Trained:
    """What `attach_and_train` did. Seconds: by the clock, of calibrating and attaching, and of the whole loop."""

    attachment: ll.Attachment
    progress: Progress
    attach_seconds: float
    train_seconds: float


@dataclass
class Session:
    """A base and a task's examples, ready for work.

    Attributes:
        model: the live model, which adapters are attached to. tokenizer: its own.
        encoded: split -> token ids of its examples, those left out that are too long or empty; not of "test".
        tokens: split -> what became of its examples.
    """

    base: Base
    data: Data
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoded: dict[str, list[Encoded]]
    tokens: dict[str, TokenReport]

    @classmethod
    def open(cls, base: Base, data: Data, max_length: int = MAX_LENGTH) -> "Session":
        """Read the model, and encode the examples. max_length: of an example, in tokens.

        Raises `ModelError` for a model that cannot be read, `DataError` where no example of a split is left.
        """
        model, tokenizer = base.load()
        splits = {split: examples for split, examples in data.examples.items() if split != ANSWERED}
        encodings = {split: encode(examples, tokenizer, max_length) for split, examples in splits.items()}
        encoded = {split: items for split, (items, _) in encodings.items()}
        return cls(base, data, model, tokenizer, encoded, {split: report for split, (_, report) in encodings.items()})

    @property
    def pad(self) -> int:
        """The token to pad with."""
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def reload(self) -> None:
        """Read the model again. The old one is let go first: two may not fit."""
        del self.model
        gc.collect()
        self.model, _ = self.base.load()

    def with_fresh_base(self) -> "Session":
        """The same session on another copy of the base, beside this one."""
        model, tokenizer = self.base.load()
        return dataclasses.replace(self, model=model, tokenizer=tokenizer)

    def batches(self, size: int, number: int | None = None) -> list[dict[str, Tensor]]:
        """The first `number` training batches of `size` examples, as `collate` gives them; None: all."""
        items = self.encoded["train"]
        last = len(items) if number is None else min(len(items), number * size)
        return [collate(items[start : start + size], self.pad) for start in range(0, last, size)]

    def calibration(
        self, methods: Sequence[ll.AdapterConfig], size: int, number: int = CALIBRATION_BATCHES
    ) -> list[dict[str, Tensor]] | None:
        """The first training batches without their labels, where a method needs data; else None."""
        if not needs_data(methods):
            return None
        return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in self.batches(size, number)]

    def attach_and_train(
        self,
        methods: Sequence[ll.AdapterConfig],
        training: TrainConfig,
        folder: Path | None = None,
        resume: bool = False,
        calibration_batches: int = CALIBRATION_BATCHES,
        train_also: Sequence[str] = (),
        on_attach: Callable[[ll.Attachment], None] | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Trained:
        """Attach adapters, and train them on the training examples. Other settings: as for `attach` and `train`.

        folder: of the checkpoints. resume: go on from the last one there. on_attach: called before the first step.
        Raises what `attach` and `train` raise.
        """
        started = time.perf_counter()
        batches = self.calibration(methods, training.batch_size, calibration_batches)
        att = ll.attach(self.model, methods, batches, train_also=train_also)
        attached = time.perf_counter()
        if on_attach is not None:
            on_attach(att)
        progress = train(self.model, self.encoded["train"], self.pad, training, folder, resume, on_step=on_step)
        return Trained(att, progress, attached - started, time.perf_counter() - attached)

    def answers(self, first: int | None = None, max_new_tokens: int | None = None, progress: bool = True) -> Evaluation:
        """The model's replies to the first test items (None: all), scored. Other settings: as for `evaluate`."""
        items = self.data.examples[ANSWERED][:first]
        return evaluate(
            self.model, self.tokenizer, self.data.task, items, max_new_tokens=max_new_tokens, progress=progress
        )
