"""Does this method work on this model? A table of measured facts, each beside its bound, found in under a minute."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import lora_lite as ll
from lora_lite.lab import terminal
from lora_lite.lab.models.base import Base
from lora_lite.lab.probe.checks import Batch, Configs, Probe
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.progress import TrainConfig
from lora_lite.lab.training.session import Session, draw

STEPS = 3  # the second is the first in which all of a LoRA can move
EXAMPLES, BATCH = 8, 2
TASK = "family_relationships"  # where none is given: any will do
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Check:
    """One row. ok: None where the check does not apply, or was not reached."""

    name: str
    measured: str
    bound: str
    ok: bool | None

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAILED", None: "-"}[self.ok]


class CheckRecord(TypedDict):
    """The fields of a `Check` but for its name."""

    measured: str
    bound: str
    ok: bool | None


class ProbeRecord(TypedDict):
    """The last line of output. checks: by name."""

    ok: bool
    seconds: float
    checks: dict[str, CheckRecord]


@dataclass(frozen=True)
class ProbeReport:
    """What `probe` found. ok: no check failed."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def table(self) -> Table:
        """For people."""
        table = terminal.table(f"probe, {self.seconds:.0f} s")
        for title in ("check", "measured", "asked for", ""):
            terminal.column(table, title)
        for check in self.checks:
            style = "bold red" if check.ok is False else ""
            terminal.row(table, (check.name, check.measured, check.bound, check.verdict), style)
        return table

    def summary(self) -> ProbeRecord:
        """As plain data for JSON."""
        rows = {c.name: CheckRecord(measured=c.measured, bound=c.bound, ok=c.ok) for c in self.checks}
        return {"ok": self.ok, "seconds": round(self.seconds, 1), "checks": rows}


def probe(run: RunConfig, method: ll.AdapterConfig | Configs, training: TrainConfig) -> ProbeReport:
    """`probe_method` on a model by name, with a few training examples of the run's task.

    Raises ModelError, TaskError, DataError where there is nothing to probe with; what the method does wrong is a row.
    """
    data = draw(run.task or TASK, {"train": min(EXAMPLES, run.train_examples)}, training.seed)
    session = Session.open(Base.of(run, run.device), data, run.max_length)
    copies = iter([session.model])

    def fresh() -> PreTrainedModel:
        return next(copies, None) or session.with_fresh_base().model

    methods = [method] if isinstance(method, ll.AdapterConfig) else list(method)
    batches, calibration = session.batches(BATCH), session.calibration(methods, BATCH)
    return probe_method(fresh, methods, batches, calibration, training.lr, train_also=run.train_also)


def probe_method(
    fresh: Callable[[], PreTrainedModel],
    method: ll.AdapterConfig | Configs,
    batches: Sequence[Batch],
    calibration_data: Any = None,
    lr: float | None = None,
    steps: int = STEPS,
    train_also: Sequence[str] = (),
) -> ProbeReport:
    """Attach, perturb, train a few steps, save, load on a fresh base, and measure what the library promises.

    A check that fails is a row, with the reason, and the others go on; where the adapted model cannot run, none can.

    Args:
        fresh: gives a new copy of the base, in eval mode; called twice.
        method: a config, or several with disjoint targets.
        batches: at least one, with input_ids, attention_mask and labels, each (B, T).
        calibration_data: as for `attach`.
        lr: learning rate of the training steps. None: the method's default.
        steps: training steps.
        train_also: as for `attach`.
    """
    started = time.perf_counter()
    configs = [method] if isinstance(method, ll.AdapterConfig) else list(method)
    measuring = Probe(fresh, configs, batches, calibration_data, lr, steps, train_also)
    checks: list[Check] = []
    for name, bound, check in tqdm(measuring.checks(), desc="probe", unit="check", leave=False):
        if checks and not measuring.runs:
            checks.append(Check(name, NOT_REACHED, bound, None))
            continue
        try:
            measured, ok = check()
        except (ll.LoraLiteError, ValueError, RuntimeError) as error:  # torch says what does not fit as RuntimeError
            measured, ok = f"{type(error).__name__}: {error}", False
        checks.append(Check(name, measured, bound, ok))
    return ProbeReport(tuple(checks), time.perf_counter() - started)
