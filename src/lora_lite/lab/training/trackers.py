"""Experiment trackers: what `accelerate` offers, fed by the training loop.

with Trackers(["tensorboard"], folder, settings, device) as trackers:
    train(..., on_step=trackers.step)
    trackers.finish({"accuracy": 0.5})
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from lora_lite.errors import LoraLiteError
from lora_lite.lab.training.progress import Progress

PROJECT = "lora-lite"
# Tracker -> packages that serve it, the one to install first.
PACKAGES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "trackio": ("trackio",)}

Plain = bool | int | float | str


class TrackerError(LoraLiteError, ValueError):
    """A tracker that is not known, or whose package is not installed."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise `TrackerError` for a tracker that is unknown or not installed. Cheap: call it before a model is loaded."""
    for name in names:
        if name not in PACKAGES:
            raise TrackerError(f"--report-to {name}: no such tracker; there are {', '.join(PACKAGES)}")
    missing = [name for name in names if not any(map(importlib.util.find_spec, PACKAGES[name]))]
    if missing:
        packages = " ".join(PACKAGES[name][0] for name in missing)
        raise TrackerError(f"--report-to {' '.join(missing)}: its package is missing; pip install {packages}")


class Trackers:
    """Open trackers of one run; a context manager, which closes them. Without names it does nothing.

    Args:
        names: of "tensorboard", "wandb", "trackio".
        folder: where trackers that write files put them, under "lora-lite".
        settings: of the run; nested ones are written as "training.lr".
        device: where the run computes.

    Raises:
        TrackerError: as `require_trackers` does.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], device: torch.device) -> None:
        require_trackers(names)
        self.accelerator: Accelerator | None = None
        if names:
            log_with: list[Any] = list(dict.fromkeys(names))
            self.accelerator = Accelerator(cpu=device.type == "cpu", log_with=log_with, project_dir=str(folder))
            self.accelerator.init_trackers(PROJECT, config=plain(settings))
        self._steps = 0
        self._before = (0, 0.0)  # tokens and seconds at the step before

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.accelerator is not None:
            self.accelerator.end_training()
            self.accelerator = None

    def step(self, progress: Progress) -> None:
        """Write loss, learning rate, gradient norm and tokens/s of the step just made; the `on_step` of `train`."""
        tokens, seconds = (
            now - then for now, then in zip((progress.tokens, progress.seconds), self._before, strict=True)
        )
        if self._steps != progress.step - 1:  # the first step of a resumed run: only sums over all steps are known
            tokens, seconds = progress.tokens, progress.seconds
        self._steps, self._before = progress.step, (progress.tokens, progress.seconds)
        self._log(
            {
                "train/loss": progress.losses[-1],
                "train/learning_rate": progress.rate,
                "train/gradient_norm": progress.grad_norm,
                "train/tokens_per_second": tokens / max(seconds, 1e-9),
            }
        )

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the final metrics (the numbers among them) as "final/...", at the last step."""
        numbers = {key: value for key, value in plain(metrics).items() if isinstance(value, int | float)}
        self._log({f"final/{key}": float(value) for key, value in numbers.items()})

    def _log(self, values: Mapping[str, float]) -> None:
        if self.accelerator is not None:
            self.accelerator.log(dict(values), step=self._steps)


def plain(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Plain]:
    """Settings as a flat mapping of "a.b" to numbers, booleans and strings, which all trackers take."""
    flat: dict[str, Plain] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= plain(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
