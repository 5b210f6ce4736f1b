"""What the runs of a study share: the model, the data, and what they are known by."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lora_lite.errors import LoraLiteError
from lora_lite.lab.models.base import Base
from lora_lite.lab.provenance import base_fingerprint, provenance
from lora_lite.lab.studies.records import Fingerprints, Plan, Sources
from lora_lite.lab.studies.study import Study
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.corpora import general_text
from lora_lite.lab.tasks.task import Example, fingerprint
from lora_lite.lab.terminal import note
from lora_lite.lab.training.data import Encoded, answer_budget, encode, text_windows
from lora_lite.lab.training.evaluate import Evaluation, answer_loss_of, text_loss
from lora_lite.lab.training.session import HELD_OUT_SEED, Session, draw
from lora_lite.lab.training.trackers import Trackers


class DivergedError(LoraLiteError, ArithmeticError):
    """A trained adapter gives losses that are not finite."""


class BaseChangedError(LoraLiteError, RuntimeError):
    """A run left the base with other bits than it found."""


@dataclass
class Workbench:
    """A session, and what a study measures on it.

    Attributes:
        windows: token ids of pieces of general text. other: examples of another task. Forgetting is measured on both.
        max_new_tokens: of a reply.
        fingerprints: of the base and of each part of the data; runs are named by them, among others.
        sources: where the data came from, with counts of what was left out.
        trackers: makes a run's trackers, from a folder and settings.
    """

    study: Study
    session: Session
    windows: list[list[int]]
    other: list[Encoded]
    max_new_tokens: int
    fingerprints: Fingerprints
    sources: Sources
    trackers: Callable[..., Trackers]

    def require_base(self) -> None:
        """Raise `BaseChangedError` if the model's bits are not those it was read with."""
        before = self.fingerprints["base"]
        if (now := base_fingerprint(self.session.model)) != before:
            raise BaseChangedError(f"the base's bits changed during this run ({before} became {now})")

    def losses(self, forgetting: bool, trained: bool = True) -> dict[str, float]:
        """Mean losses in nats a token: on validation answers and, for `forgetting`, elsewhere.

        trained: whether the model has an adapter. Raises `DivergedError`, which says whose they are, if one is not
        finite.
        """
        model, pad, size = self.session.model, self.session.pad, self.study.training.batch_size
        losses = {"validation": answer_loss_of(model, self.session.encoded["validation"], pad, size)}
        if forgetting and self.windows:
            losses["general text"] = text_loss(model, self.windows)
        if forgetting and self.other:
            losses[self.study.other_task] = answer_loss_of(model, self.other, pad, size)
        if infinite := ", ".join(f"{name}: {loss}" for name, loss in losses.items() if not math.isfinite(loss)):
            if not trained:
                raise DivergedError(
                    f"the base's own loss is not finite ({infinite}): its weights are damaged, or too large for the "
                    "dtype; fetch the model again, or give --dtype float32"
                )
            raise DivergedError(f"the loss after training is not finite ({infinite}): the rate is too high")
        return losses

    def answers(self) -> Evaluation:
        """The model's replies to the test items."""
        return self.session.answers(max_new_tokens=self.max_new_tokens)


def open_workbench(study: Study) -> Workbench:
    """Load what a study needs. Raises what is wrong with the task, the data or the model, before anything is run."""
    base = Base.of(study)
    sizes = {
        "train": study.training_examples, "validation": study.validation_examples, "test": study.test_examples,
    }  # fmt: skip
    data = draw(study.task, sizes)
    elsewhere: list[Example] = []
    few = data.few
    if study.other_task:
        parts, few_other = load_task(study.other_task).parts({"test": study.other_examples}, HELD_OUT_SEED)
        elsewhere, few = parts["test"], (*few, *few_other)
    for line in few:
        note(line)
    session = Session.open(base, data, study.max_length)
    other, report = encode(elsewhere, session.tokenizer, study.max_length) if elsewhere else ([], None)
    text = general_text(study.general_text) if study.general_windows else ""
    tokenizer = session.tokenizer
    windows = text_windows(text, tokenizer, study.window_tokens, study.general_windows) if text else []
    decoded = [Example(str(tokenizer.decode(window)), "", "text") for window in windows]
    fingerprints = Fingerprints(
        base=base_fingerprint(session.model), **data.fingerprints, other=fingerprint(elsewhere),
        general=fingerprint(decoded),
    )  # fmt: skip
    sources: Sources = {
        "task": dict(data.task.provenance),
        "tokens": {
            "train": session.tokens["train"].record(),
            "validation": session.tokens["validation"].record(),
            "other": report.record() if report else None,
        },
        "notes": [*data.task.notes, *few],
        "examples": data.counts,
    }
    budget = study.max_new_tokens or answer_budget(data.task, tokenizer)
    trackers = partial(Trackers, (), device=base.device)
    return Workbench(study, session, windows, other, budget, fingerprints, sources, trackers)


def plan_of(bench: Workbench, command: str = "") -> Plan:
    """What `study.json` holds. command: what repeats it."""
    base = bench.session.base
    return {
        "study": bench.study.to_dict(),
        "prints": bench.fingerprints,
        "dtype": base.dtype_name,
        "device": base.device.type,
        "max_new_tokens": bench.max_new_tokens,
        "sources": bench.sources,
        "provenance": provenance(base.device),
        "command": command,
    }
