"""What the files of a study's folder hold. `ledger.py` writes and reads runs, `plan.py` the plan.

Losses are means in nats a token; shares are in [0, 1]; times are in seconds. Fingerprints are 16 hex digits.
"""

from typing import Any, TypedDict

from lora_lite.lab import identity
from lora_lite.lab.costs.rows import CostRow
from lora_lite.lab.provenance import Provenance
from lora_lite.lab.training.data import TokenRecord

DONE, FAILED = "done", "failed"


class Fingerprints(TypedDict):
    """Of the base and of each part of the data. other, general: what forgetting is measured on."""

    base: str
    train: str
    validation: str
    test: str
    other: str
    general: str


class SplitTokens(TypedDict):
    """What became of the examples that were encoded; `other`: None without another task."""

    train: TokenRecord
    validation: TokenRecord
    other: TokenRecord | None


class _Sources(TypedDict):
    task: dict[str, Any]
    tokens: SplitTokens
    notes: list[str]


class Sources(_Sources, total=False):
    """Where the data came from.

    task: the task's own sources, with what it left out. notes: what a reader must know. examples: how many each part
    has (runs of earlier versions do not say).
    """

    examples: dict[str, int]


class Plan(TypedDict):
    """`study.json`: what a study asks for, and what a reader of the folder needs to find its runs.

    study: the fields of `Study`. max_new_tokens: of a reply. provenance: of the process that wrote it last. command:
    what repeats it.
    """

    study: dict[str, Any]
    prints: Fingerprints
    dtype: str
    device: str
    max_new_tokens: int
    sources: Sources
    provenance: Provenance
    command: str


class _JobConfig(TypedDict):
    kind: str
    model: str
    quantization: str
    dtype: str
    device: str
    prints: dict[str, str]


class JobConfig(_JobConfig, total=False):
    """All that a job's result depends on, and no more (see `identity`): its hash names the run.

    methods: each with its settings, see `described`. training: the fields of `TrainConfig` that count.
    """

    task: str
    max_length: int
    max_new_tokens: int
    methods: list[dict[str, Any]]
    calibration_batches: int
    training: dict[str, Any]


class Losses(TypedDict):
    """Of validation answers and, under the name of the text or task, elsewhere."""

    validation: float


class RunHead(TypedDict):
    """What every run holds.

    status: "done" or "failed". started: in UTC, as 2026-11-25T05:39:23Z. digest: SHA-256 of all else, see
    `ledger.digest`.
    """

    format: int
    id: str
    status: str
    config: JobConfig
    started: str
    seconds_in_all: float
    provenance: Provenance
    digest: str


class _Replies(TypedDict):
    accuracy: float
    mentioned: float
    cut_off: float
    new_tokens: int
    scores: list[float]
    completions: list[str]


class Replies(_Replies, total=False):
    """Replies to the test items, which are in the ledger's data in the same order.

    accuracy, mentioned, cut_off: shares of the items; see `Evaluation`. scores: the verifier's, in [0, 1].
    verifier_failures: replies that it gave no score (runs of earlier versions had none).
    """

    verifier_failures: int


class BaseFigures(Replies):
    """Of the bare base."""

    losses_after: Losses


class TuneFigures(TypedDict):
    """Of a run at one of the rates.

    curve: training loss of each step. tokens, answer_tokens: read, and learnt from. trainable: trained values.
    stored_bytes: of the adapter's file. seconds: "attach_calibration", "attach_factorisation", "attach_build", "train",
    "evaluate".
    """

    curve: list[float]
    tokens: int
    answer_tokens: int
    losses_after: Losses
    trainable: int
    stored_bytes: int
    seconds: dict[str, float]


class SeedFigures(TuneFigures, Replies):
    """Of a run at the chosen rate."""


class CostFigures(TypedDict):
    """Of a job that measures costs."""

    cost: CostRow


class RunRecord(RunHead, SeedFigures, CostFigures):
    """A file of `runs/`: its head, and the figures of its kind where it is done (`Ledger.figures` sees to that).

    reason: why it failed, where it did.
    """

    reason: str


FIGURES: dict[str, tuple[type, ...]] = {
    identity.BASE: (RunHead, BaseFigures),
    identity.TUNE: (RunHead, TuneFigures),
    identity.SEED: (RunHead, SeedFigures),
    identity.COST: (RunHead, CostFigures),
}
