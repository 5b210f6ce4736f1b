"""A study: what to compare, on what, how often. Declared as data; the library's own are files in `studies/`."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, get_type_hints

import tyro
import yaml

import lora_lite as ll
from lora_lite.config import DEFAULT_ROLES
from lora_lite.lab.identity import BASE, COST, SEED, TUNE
from lora_lite.lab.models.load import EMBEDDED, QUANTIZATIONS
from lora_lite.lab.shared_flags import TrustRemoteCode
from lora_lite.lab.studies.arms import ALL, Arm, parse_arms
from lora_lite.lab.studies.shapes import fits
from lora_lite.lab.training.config import described
from lora_lite.lab.training.data import MAX_LENGTH
from lora_lite.lab.training.progress import TrainConfig

TUNING_SEED = 0
MOST_RUNS = 99  # of an arm: seeds, or learning rates


class StudyError(ll.LoraLiteError, ValueError):
    """A study cannot be read, or asks for what cannot be."""


@dataclass(frozen=True)
class Study:
    """What to compare, and how.

    Every arm gets the same: the data, the steps, the tokens, the targets, and as many learning rates, spaced alike
    around its method's registered default. The rate with the lowest validation loss is taken; then come the seeds,
    which the choice has not seen.

    Attributes:
        name: of the study.
        about: the question that it asks.
        methods: the arms: methods with settings, such as "lora,dora[r=4],antipasto_arrow[block=8,32]"; a setting with
            several values gives an arm for each; "all" is every trained method.
        baseline: the arm that the others are compared with; empty: the first.
        model: "smollm2" (embedded), a hub id or a local folder.
        quantization: of the base: "none", "4bit" or "8bit".
        dtype: of the base: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.
        task: what to train on and measure: see `lora-lite train --help`.
        train_examples: distinct examples to train on. None: as many as the steps can use. Of these and the next two:
            all that there are where the task has fewer, which is said.
        validation_examples: those that the learning rate is chosen on.
        test_examples: items to measure on, the same for all.
        seeds: how many seeds at the chosen rate; they are 1, 2, ... (tuning uses 0).
        rates: how many learning rates to try for each arm; odd, so that the middle one is the centre.
        rate_factor: the centre of every arm's rates as a multiple of its method's registered default. Short studies
            need larger ones.
        rate_ratio: from one rate to the next.
        training: steps, batch size and schedule. Its lr and seed are set by the study.
        target_names: names or regexes of the layers to adapt, for methods that do not choose their own.
        target_roles: roles of the layers to adapt, for the same methods.
        layers: indices of the layers to adapt. None: all.
        max_length: longest example in tokens; longer ones are left out and counted.
        max_new_tokens: longest reply. None: the task's own figure, or one measured on training answers.
        general_text: text to measure forgetting on: "embedded", a file, or a hub id.
        general_windows: how many pieces of it; 0: none.
        window_tokens: length of each piece.
        other_task: another task to measure forgetting on (the loss on its answers). Empty: none.
        other_examples: how many examples of it.
        costs: whether to measure what each arm costs.
        calibration_batches: training batches that methods and bases which need data are calibrated on.
        arms_as_run: arm -> "methods", its settings, and "rates", as a folder of results records them: what was measured
            stays findable when a default changes. Empty: those of today.
    """

    name: str = "bench"
    about: str = ""
    methods: tuple[str, ...] = (ALL,)
    baseline: str = ""
    model: str = EMBEDDED
    quantization: str = "none"
    dtype: str = "auto"
    trust_remote_code: TrustRemoteCode = False
    task: str = "family_relationships"
    train_examples: int | None = None
    validation_examples: int = 64
    test_examples: int = 100
    seeds: int = 3
    rates: int = 3
    rate_factor: float = 1.0
    rate_ratio: float = 3.0
    training: TrainConfig = field(default_factory=TrainConfig)
    target_names: tuple[str, ...] = ()
    target_roles: tuple[str, ...] = DEFAULT_ROLES
    layers: tuple[int, ...] | None = None
    max_length: int = MAX_LENGTH
    max_new_tokens: int | None = None
    general_text: str = "embedded"
    general_windows: int = 16
    window_tokens: int = 128
    other_task: str = "gsm_symbolic"
    other_examples: int = 16
    costs: bool = True
    calibration_batches: int = 8
    arms_as_run: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = ("validation_examples", "test_examples", "seeds", "rates", "calibration_batches")
        least = {"window_tokens": 2, "max_length": 2, "general_windows": 0, "other_examples": 0}
        for name, low in {**dict.fromkeys(positive, 1), **least}.items():
            if getattr(self, name) < low:
                raise StudyError(f"{name} = {getattr(self, name)}: must be an integer >= {low}")
        for name in ("seeds", "rates"):
            if getattr(self, name) > MOST_RUNS:
                raise StudyError(f"{name} = {getattr(self, name):,}: at most {MOST_RUNS} can be asked for")
        if self.rates % 2 == 0:
            raise StudyError(f"rates = {self.rates}: must be odd, so that the centre is among them")
        if not (self.rate_factor > 0 and self.rate_ratio > 1):
            raise StudyError(f"rate_factor = {self.rate_factor} must be > 0 and rate_ratio = {self.rate_ratio} > 1")
        if (self.training.lr, self.training.seed) != (None, 0):
            raise StudyError("lr and seed are set by the study: see rates, rate_factor and seeds")
        if self.quantization not in QUANTIZATIONS:
            raise StudyError(f"quantization = {self.quantization!r}: must be one of {', '.join(QUANTIZATIONS)}")
        if self.baseline and self.baseline not in (names := [arm.name for arm in self.arms()]):
            raise StudyError(f"baseline = {self.baseline!r} is none of the arms {', '.join(names)}")

    def arms(self) -> list[Arm]:
        """The arms. Raises `ArmError` for a line that cannot be read."""
        common: dict[str, Any] = {}
        if self.target_roles != DEFAULT_ROLES:  # else names, if given, go before them
            common["target_roles"] = self.target_roles
        if self.target_names:
            common["target_names"] = self.target_names
        if self.layers is not None:
            common["layers"] = self.layers
        return parse_arms(self.methods, common)

    @property
    def reference(self) -> str:
        """The name of the baseline's arm."""
        return self.baseline or self.arms()[0].name

    @property
    def training_examples(self) -> int:
        """How many training examples to draw."""
        return self.train_examples or self.training.steps * self.training.batch_size

    def grid(self, arm: Arm) -> list[float]:
        """The learning rates to try for an arm, rising; rounded to 3 digits, so that they read as they are."""
        if arm.name in self.arms_as_run:
            return list(self.arms_as_run[arm.name]["rates"])
        middle = self.rates // 2
        centre = arm.lr * self.rate_factor
        return [_rounded(centre * self.rate_ratio ** (index - middle)) for index in range(self.rates)]

    def described(self, arm: Arm, seed: int) -> list[dict[str, Any]]:
        """An arm's methods with all their settings, the seed of their initial values among them."""
        if arm.name in self.arms_as_run:
            return [{**values, "seed": seed} for values in self.arms_as_run[arm.name]["methods"]]
        settings = [described(cfg) for cfg in arm.with_seed(seed)]
        return json.loads(json.dumps(settings))  # as a file gives it: lists, no tuples

    def as_run(self) -> "Study":
        """The study with the settings and rates of its arms written out."""
        arms = {arm.name: {"methods": self.described(arm, 0), "rates": self.grid(arm)} for arm in self.arms()}
        return dataclasses.replace(self, arms_as_run=arms)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Study":
        """The study that plain data stand for. Raises `StudyError` for an unknown or refused field."""
        if not isinstance(values.get("training", {}), Mapping):
            raise StudyError(f"a study's training is a mapping of fields, got {values['training']!r:.80}")
        training = dict(values.get("training") or {})
        for known, given in ((cls, values), (TrainConfig, training)):
            names = [each.name for each in dataclasses.fields(known)]
            if unknown := sorted(map(str, set(given) - set(names))):
                raise StudyError(f"a study has no field {', '.join(unknown)}; the fields are {', '.join(names)}")
            require_types(known, given)
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            return cls(**{**plain, "training": TrainConfig(**training)})
        except (TypeError, ValueError) as error:
            raise StudyError(str(error)) from error


def require_types(cls: type, given: Mapping[str, Any]) -> None:
    """Raise `StudyError` for a value of plain data that is not of its field's type."""
    hints = get_type_hints(cls)
    for name, value in given.items():
        if name != "training" and not fits(value, hints[name]):
            wanted = str(getattr(hints[name], "__name__", hints[name])).replace("tuple", "list")
            raise StudyError(f"{name} = {value!r:.80}: is not of type {wanted}")


def _rounded(value: float) -> float:
    digits = 2 - math.floor(math.log10(value))
    return round(value, digits)


def study_names() -> list[str]:
    """The studies that come with the library."""
    folder = resources.files("lora_lite.lab.studies")
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))


def load_study(name: str, smoke: bool = False) -> Study:
    """A study of the library, by name.

    smoke: its small version, which shows in minutes that everything runs. Raises `StudyError` for an unknown name.
    """
    if name not in study_names():
        raise StudyError(f"no study {name!r}; there are {', '.join(study_names())}")
    file = resources.files("lora_lite.lab.studies").joinpath(f"{name}.yaml")
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    small = values.pop("smoke", {})
    if smoke:
        training = {**values.get("training", {}), **small.pop("training", {})}
        values = {**values, **small, "training": training}
    return Study.from_dict({"name": f"{name}-smoke" if smoke else name, **values})


@dataclass(frozen=True)
class Job:
    """One thing to do for a study.

    Attributes:
        kind: "base" (measure the bare base), "tune" (train at one of the rates, and take the validation loss), "seed"
            (train at the chosen rate and measure) or "cost".
        arm: the arm; None for the base.
        lr, seed: of the training run.
    """

    kind: str
    arm: Arm | None = None
    lr: float | None = None
    seed: int = TUNING_SEED

    def __str__(self) -> str:
        words = [self.kind, self.arm.name if self.arm else "", f"lr {self.lr:g}" if self.lr else ""]
        return " ".join([*filter(None, words), *([f"seed {self.seed}"] if self.kind == SEED else [])])


def jobs(study: Study, chosen: Mapping[str, float | None]) -> Iterable[Job]:
    """What there is to do, in order: breadth first, so that a study that is cut short has something of every arm.

    chosen: arm -> its chosen rate; an arm that is not in it is still being tuned, None: every rate failed.
    """
    arms = study.arms()
    yield Job(BASE)
    for arm in arms:
        for lr in study.grid(arm):
            yield Job(TUNE, arm, lr)
    for seed in range(1, study.seeds + 1):
        for arm in arms:
            if chosen.get(arm.name) is not None:
                yield Job(SEED, arm, chosen[arm.name], seed)
    if study.costs:
        yield from (Job(COST, arm) for arm in arms)
