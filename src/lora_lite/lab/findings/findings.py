"""What a study found, as plain data: what tables, pages and README are made of. `analysis.py` fills it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lora_lite.lab.numerals import Interval
from lora_lite.printable import printable


@dataclass(frozen=True)
class Change:
    """A mean loss (nats a token) without any adapter, and with the trained one."""

    before: float
    after: Interval


@dataclass(frozen=True)
class Cost:
    """What an arm costs.

    Attributes:
        trainable: trained values.
        stored_bytes: size of its file.
        macs_token, macs_step: multiply-accumulates that it adds to a token's forward pass, and once a pass.
        base_macs_token: those of the frozen base, for one token of a short text.
        forward, step: time as a ratio to the frozen base's in the same process (median and quartiles of the rounds): of
            a forward pass, and of a forward and backward pass.
        tokens_per_second: of training.
        peak_memory_mb: in 10^6 bytes, of a training step in a fresh process (of the GPU where there is one).
        base_peak_memory_mb: the same of the frozen base's forward and backward pass.
        attach_seconds: "calibration", "factorisation", "build".
        load_seconds: loading the adapter's file onto a base.
    """

    trainable: int
    stored_bytes: int | None = None
    macs_token: int | None = None
    macs_step: int | None = None
    base_macs_token: int | None = None
    forward: Interval | None = None
    step: Interval | None = None
    tokens_per_second: float | None = None
    peak_memory_mb: float | None = None
    base_peak_memory_mb: float | None = None
    attach_seconds: dict[str, float] = field(default_factory=dict)
    load_seconds: float | None = None


@dataclass(frozen=True)
class Finding:
    """One arm of a study: a method with its settings.

    Attributes:
        arm: its name, such as "lora" or "antipasto_arrow[block=32]". method: registry name ("base" for no adapter).
        title, arxiv: the method's paper.
        seeds: seeds measured. wanted_seeds: seeds that the study asks for.
        rates: learning rate -> validation loss (nats a token) at that rate; a rate not run yet is missing; None: it
            failed.
        rate: the chosen rate; None before all are tried. edge: "lowest" or "highest" where it is the grid's end.
        accuracy: mean over seeds, 95% interval over seeds and items; None if nothing is measured.
        by_seed: accuracy of each seed.
        against: the difference to the baseline on the same items, with the 95% interval that holds together with those
            of all other arms. verdict: "baseline", "better", "worse" (just where that interval leaves out 0), "tie" or
            "" (not comparable yet: fewer than two seeds of the arm or of the baseline; then the interval covers items
            alone). p: of the difference being 0, adjusted for the arms compared: below 0.05 just where it is decided.
        alone: the same difference with the 95% interval of this one comparison; None without a verdict.
        seen: the smallest difference to the baseline (a share) that the study would have found in 80 of 100 cases; None
            without a verdict, or if the baseline's accuracy leaves no room for one.
        places: best and worst place among the arms that the data allow.
        mentioned: share of replies in which the right answer occurs anywhere.
        cut_off: share of replies that reached the largest number of new tokens.
        validation_loss: at the chosen rate, over the seeds.
        curves: seed -> training loss of each step, at the chosen rate.
        forgetting: name of a text or task -> its loss before and after.
        failures: what failed, with reasons.
        missing: what the study asks for and is not there yet, in words.
    """

    arm: str
    method: str
    title: str
    arxiv: str
    seeds: tuple[int, ...]
    wanted_seeds: int
    rates: dict[float, float | None]
    rate: float | None
    edge: str
    accuracy: Interval | None
    by_seed: dict[int, float]
    against: Interval | None
    verdict: str
    p: float | None
    places: tuple[int, int] | None
    mentioned: float | None
    cut_off: float | None
    validation_loss: Interval | None
    curves: dict[int, list[float]]
    forgetting: dict[str, Change]
    cost: Cost | None
    alone: Interval | None = None
    seen: float | None = None
    failures: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What an arm (its first seed) answered to an item."""

    arm: str
    text: str
    score: float


@dataclass(frozen=True)
class Item:
    """A test item with replies to it."""

    prompt: str
    answer: str
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Findings:
    """A whole study.

    Attributes:
        name: of the study. about: what it asks, in a sentence or two.
        task, model, quantization, dtype: what was trained on what.
        baseline: the arm that others are compared with.
        items: test items. steps, batch_size: of each training run.
        setup: further settings, label -> value, ready to show.
        base: the bare base (method "base"), measured without any adapter. None before it is measured.
        arms: in an order that claims nothing: by best place, then worst place, then name.
        examples: test items with replies, right and wrong ones.
        notes: caveats to print beside the numbers (such as where validation questions come from).
        missing: what the study still lacks, in words; empty where it is whole.
        failures: what failed, with reasons, the bare base and the costs included.
        machines: what it ran on: device, versions, commits.
        command: what repeats it.
    """

    name: str
    about: str
    task: str
    model: str
    quantization: str
    dtype: str
    baseline: str
    items: int
    steps: int
    batch_size: int
    setup: dict[str, str]
    base: Finding | None
    arms: tuple[Finding, ...]
    examples: tuple[Item, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    failures: tuple[str, ...]
    machines: tuple[str, ...]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return dataclasses.asdict(self)


def shown(value: Any) -> Any:
    """Findings, or a part of them, with every text made fit to be shown: see `printable`."""
    if isinstance(value, str):
        return printable(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{field.name: shown(getattr(value, field.name)) for field in fields})
    if isinstance(value, dict):
        return {shown(key): shown(each) for key, each in value.items()}
    return type(value)(map(shown, value)) if isinstance(value, list | tuple) else value
