"""What is known of an arm's costs, as plain data. Sizes in bytes, memory in 10^6 bytes, times in seconds."""

from typing import TypedDict

from lora_lite.lab.provenance import Provenance


class ShapeCost(TypedDict):
    """What shapes give for an arm.

    Attributes:
        trainable: trained values. targets: adapted layers.
        stored_bytes: of the adapter's file. stored_bytes_without_basis: of one saved with `basis=False`; None where
            there is no basis, or it cannot be rebuilt.
        macs_token, macs_step: multiply-accumulates added to a token's forward pass, and once a pass.
    """

    trainable: int
    targets: int
    stored_bytes: int
    stored_bytes_without_basis: int | None
    macs_token: int
    macs_step: int


class BaseCost(TypedDict):
    """What shapes give for the base: multiply-accumulates of one token of a short text (None: not countable)."""

    base_macs_token: int | None
    base_parameters: int


class Span(TypedDict):
    """Median and quartiles of the rounds' ratios, under the names of `Interval`."""

    mean: float
    low: float
    high: float


class MeasuredWith(TypedDict):
    """What was run to measure: the fields of `Workload`, on which base."""

    model: str
    dtype: str
    quantization: str
    batch_size: int
    tokens: int
    rounds: int
    calibration_batches: int


class Times(TypedDict, total=False):
    """Times of an arm.

    forward, step: as ratios to the frozen base's; step: forward and backward. tokens_per_second: of a step with the
    optimiser's. A method that is not trained has neither of the last two.
    """

    forward: Span
    step: Span
    tokens_per_second: float


class MeasuredCost(Times, total=False):
    """What running an arm shows.

    Attributes:
        attach_seconds: "calibration", "factorisation", "build". load_seconds: loading its file onto a base.
        peak_memory_mb: of a training step in a fresh process; None for a method that is not trained.
        base_peak_memory_mb: the same of the frozen base's forward and backward pass.
    """

    attach_seconds: dict[str, float]
    load_seconds: float
    base_peak_memory_mb: float
    peak_memory_mb: float | None
    measured_with: MeasuredWith
    provenance: Provenance


class ArmCost(MeasuredCost):
    """What `measure_arm` gives: with the sizes of what it attached and saved."""

    trainable: int
    targets: int
    stored_bytes: int


class CostRow(ShapeCost, BaseCost, MeasuredCost):
    """An arm's costs: of shapes, and what was measured, if it was."""


class Misfit(TypedDict):
    """The row of an arm that does not fit the model: why."""

    error: str


Row = CostRow | Misfit
