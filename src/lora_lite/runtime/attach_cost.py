"""What attaching cost: seconds by phase, and memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class AttachCost:
    """What `attach` cost.

    Attributes:
        seconds: "calibration" (the pass over the data), "factorisation" (making adapters: initial values, bases),
            "build" (`derive`: the tensors that no file holds). Finding targets and hooking layers is in none of them.
        tokens: calibration tokens that reached a layer, at most.
        statistics_bytes: memory of the statistics.
        peak_memory_mb: peak (10^6 bytes) of the GPU's memory where the model is on one, else of the process, since it
            started.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    statistics_bytes: int = 0
    peak_memory_mb: float = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items())
        data = f"{self.tokens:,} tokens, statistics {self.statistics_bytes / 1e6:.1f} MB; " if self.tokens else ""
        return f"attach: {phases}; {data}peak memory {self.peak_memory_mb:.0f} MB"


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far, in 10^6 bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
