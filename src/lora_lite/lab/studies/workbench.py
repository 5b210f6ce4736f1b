"""What the runs of a study share: the model, the data, and what they are known by."""

import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.errors import LoraLiteError
from lora_lite.lab.models.devices import pick_device, pick_dtype
from lora_lite.lab.models.load import load_model
from lora_lite.lab.provenance import base_print, provenance
from lora_lite.lab.studies.study import Study
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.corpora import general_text
from lora_lite.lab.tasks.task import Example, Task, fingerprint, require_sound_key
from lora_lite.lab.terminal import note
from lora_lite.lab.training.data import Encoded, answer_budget, encode, text_windows
from lora_lite.lab.training.evaluate import Evaluation, answer_loss_of, evaluate, text_loss
from lora_lite.lab.training.trackers import Trackers

DATA_SEED = 0


class DivergedError(LoraLiteError, ArithmeticError):
    """A trained adapter gives losses that are not finite."""


class BaseChangedError(LoraLiteError, RuntimeError):
    """A run left the base with other bits than it found."""


@dataclass
class Workbench:
    """A model and data, ready for runs.

    Attributes:
        prints: fingerprints of the base and of each part of the data; runs are named by them, among others.
        sources: where the data came from, with counts of what was left out.
        trackers: makes a run's trackers, from a folder and settings.
    """

    study: Study
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Example]
    windows: list[list[int]]
    other: list[Encoded]
    max_new_tokens: int
    prints: dict[str, str]
    sources: dict[str, Any]
    trackers: Callable[..., Trackers]

    @property
    def pad(self) -> int:
        """The token to pad with."""
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def reload(self) -> None:
        """Read the model again. The old one is let go first: two may not fit."""
        del self.model
        gc.collect()
        self.model, _ = load_base(self.study, self.dtype, self.device)

    def require_base(self) -> None:
        """Raise `BaseChangedError` if the model's bits are not those it was read with."""
        if (now := base_print(self.model)) != self.prints["base"]:
            raise BaseChangedError(f"the base's bits changed during this run ({self.prints['base']} became {now})")

    def losses(self, forgetting: bool, trained: bool = True) -> dict[str, float]:
        """Mean losses in nats a token: on validation answers and, for `forgetting`, elsewhere.

        trained: whether the model has an adapter. Raises `DivergedError`, which says whose they are, if one is not
        finite.
        """
        size = self.study.training.batch_size
        found = {"validation": answer_loss_of(self.model, self.validation, self.pad, size)}
        if forgetting and self.windows:
            found["general text"] = text_loss(self.model, self.windows)
        if forgetting and self.other:
            found[self.study.other_task] = answer_loss_of(self.model, self.other, self.pad, size)
        if infinite := [f"{name}: {loss}" for name, loss in found.items() if not math.isfinite(loss)]:
            told = ", ".join(infinite)
            if not trained:
                raise DivergedError(
                    f"the base's own loss is not finite ({told}): its weights are damaged, or too large for the dtype; "
                    "fetch the model again, or give --dtype float32"
                )
            raise DivergedError(f"the loss after training is not finite ({told}): the rate is too high")
        return found

    def answers(self) -> Evaluation:
        """The model's replies to the test items."""
        return evaluate(self.model, self.tokenizer, self.task, self.test, max_new_tokens=self.max_new_tokens)


def load_base(
    study: Study, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The study's model and tokenizer. Raises `ModelError` if they cannot be read."""
    trust = study.trust_remote_code
    return load_model(study.model, dtype, device, quantization=study.quantization, trust_remote_code=trust)


def open_workbench(study: Study) -> Workbench:
    """Load what a study needs. Raises what is wrong with the task, the data or the model, before anything is run."""
    device = pick_device(None)
    dtype = pick_dtype(study.dtype, device)
    task = load_task(study.task)
    sizes = {
        "train": study.training_examples, "validation": study.validation_examples, "test": study.test_examples,
    }  # fmt: skip
    parts, few = task.parts(sizes, DATA_SEED)
    for part in ("validation", "test"):
        require_sound_key(task, parts[part])
    other: list[Example] = []
    if study.other_task:
        elsewhere, few_other = load_task(study.other_task).parts({"test": study.other_examples}, DATA_SEED)
        other, few = elsewhere["test"], (*few, *few_other)
    for line in few:
        note(line)
    model, tokenizer = load_base(study, dtype, device)
    encoded, counts = {}, {}
    for part, examples in {"train": parts["train"], "validation": parts["validation"], "other": other}.items():
        encoded[part], report = encode(examples, tokenizer, study.max_length) if examples else ([], None)
        counts[part] = dataclasses.asdict(report) if report else None
    text = general_text(study.general_text) if study.general_windows else ""
    windows = text_windows(text, tokenizer, study.window_tokens, study.general_windows) if text else []
    prints = {
        "base": base_print(model),
        **{part: fingerprint(examples) for part, examples in parts.items()},
        "other": fingerprint(other),
        "general": fingerprint([Example(str(tokenizer.decode(window)), "", "text") for window in windows]),
    }
    budget = study.max_new_tokens or answer_budget(task, tokenizer)
    sources = {
        "task": dict(task.provenance), "tokens": counts, "notes": [*task.notes, *few],
        "examples": {part: len(examples) for part, examples in parts.items()},
    }  # fmt: skip
    return Workbench(
        study, device, dtype, model, tokenizer, task, encoded["train"], encoded["validation"], parts["test"], windows,
        encoded["other"], budget, prints, sources, partial(Trackers, (), device=device),
    )  # fmt: skip


def plan_of(bench: Workbench) -> dict[str, Any]:
    """What `study.json` holds: the study, and what a reader of the folder needs to find its runs."""
    return {
        "study": bench.study.to_dict(),
        "prints": bench.prints,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": bench.device.type,
        "max_new_tokens": bench.max_new_tokens,
        "sources": bench.sources,
        "provenance": provenance(bench.device),
    }
