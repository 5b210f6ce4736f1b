"""What a study found, as plain data: what tables, pages and README are made of. `analysis.py` fills it.

Nothing here is a sentence of the report's: its words are in `lab/report/sentences.py`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lora_lite.lab.numerals import Interval
from lora_lite.printable import printable

BASE = "base"  # the frozen model alone, where arms are named


@dataclass(frozen=True)
class Missing:
    """What the study asks for and is not there yet.

    Attributes:
        arm: its name, or `BASE`, which is one measurement and has nothing below.
        rates: learning rates that are not tried yet. all_rates_failed: so that there are no seeds to run.
        seeds: not measured yet. costs: whether they are not measured yet.
    """

    arm: str
    rates: tuple[float, ...] = ()
    all_rates_failed: bool = False
    seeds: tuple[int, ...] = ()
    costs: bool = False

    def __bool__(self) -> bool:
        return self.arm == BASE or bool(self.rates or self.all_rates_failed or self.seeds or self.costs)


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        arm: its name, or `BASE`. run: "base", "rate", "seed" or "costs". value: the rate or the seed.
    """

    arm: str
    run: str
    reason: str
    value: float | None = None


@dataclass(frozen=True)
class Machine:
    """What runs ran on.

    Attributes:
        runs: how many. device: with its threads. versions: package -> number.
        commit: 12 digits, "" outside of a checkout. changes: whether the checkout had changes of its own.
    """

    runs: int
    device: str
    system: str
    versions: dict[str, str]
    commit: str
    changes: bool


@dataclass(frozen=True)
class Setup:
    """The settings that all arms share.

    Attributes:
        examples: training examples kept. too_long, empty: those left out. validation_examples: kept.
        rates, rate_ratio, rate_factor: learning rates of an arm, from one to the next, and the middle one as a multiple
            of the method's registered default.
        warmup, final_rate: shares. clip: the largest norm of a gradient.
        seeds: those wanted. longest_example, longest_reply: tokens.
        layers: indices; None: all. targets: names or roles of the layers that are adapted. own_targets: arms that
            choose their own.
        workload: (rows, tokens, rounds) of the measured times; None: costs are not measured.
        fingerprints: part of the data, or the base -> its fingerprint.
    """

    examples: int
    too_long: int
    empty: int
    validation_examples: int
    rates: int
    rate_ratio: float
    rate_factor: float
    warmup: float
    final_rate: float
    clip: float
    seeds: int
    longest_example: int
    longest_reply: int
    layers: tuple[int, ...] | None
    targets: tuple[str, ...]
    own_targets: tuple[str, ...]
    workload: tuple[int, int, int] | None
    fingerprints: dict[str, str]


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
        failures: the runs that failed.
        missing: what the study asks for and is not there yet; None where all is.
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
    failures: tuple[Failure, ...] = ()
    missing: Missing | None = None

    @property
    def bare(self) -> bool:
        """Whether it is the frozen base, without an adapter."""
        return self.method == BASE


@dataclass(frozen=True)
class Reply:
    """What an arm's first seed answered to an item."""

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
        task, model, quantization, dtype: what was trained on what. task: as it was asked for, parameters included.
        baseline: the arm that others are compared with.
        items: test items. steps, batch_size: of each training run.
        base: the bare base (method "base"), measured without any adapter. None before it is measured.
        arms: in an order that claims nothing: by best place, then worst place, then name.
        examples: test items with replies, right and wrong ones.
        task_notes: what the task says of its data (such as where validation questions come from).
        replies, unscored: replies of all runs, and those of them that the task's own verifier failed on.
        cost_devices: what costs were measured on; more than one, and they are not comparable.
        base_failure: why the base could not be measured.
        machines: what all runs ran on.
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
    setup: Setup
    base: Finding | None
    arms: tuple[Finding, ...]
    examples: tuple[Item, ...]
    machines: tuple[Machine, ...]
    command: str
    task_notes: tuple[str, ...] = ()
    replies: int = 0
    unscored: int = 0
    cost_devices: tuple[str, ...] = ()
    base_failure: Failure | None = None

    @property
    def rows(self) -> tuple[Finding, ...]:
        """The base, if it is measured, and the arms."""
        return (*([self.base] if self.base else []), *self.arms)

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What the study still lacks; empty where it is whole."""
        base = () if self.base else (Missing(BASE),)
        return (*base, *(arm.missing for arm in self.arms if arm.missing))

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Every run that failed."""
        base = (self.base_failure,) if self.base_failure else ()
        return (*base, *(failure for arm in self.arms for failure in arm.failures))

    @property
    def learnt(self) -> tuple[str, ...] | None:
        """The arms clearly above the base: their interval of accuracy lies beyond its. None: not known yet."""
        measured = [(arm.arm, arm.accuracy) for arm in self.arms if arm.accuracy]
        if self.base is None or self.base.accuracy is None or not measured:
            return None
        return tuple(name for name, accuracy in measured if accuracy.low > self.base.accuracy.high)


def shown(value: Any) -> Any:
    """Findings, or a part of them, with every text made fit to be shown: see `printable`."""
    if isinstance(value, str):
        return printable(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: shown(getattr(value, name)) for name in names})
    if isinstance(value, dict):
        return {shown(key): shown(each) for key, each in value.items()}
    return type(value)(map(shown, value)) if isinstance(value, list | tuple) else value
