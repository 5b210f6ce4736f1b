"""Whether a merged folder, loaded by transformers alone, computes what base and adapter do."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.batches import eval_mode, run, tensors_in
from lora_lite.errors import StateError
from lora_lite.files.checkpoint import load
from lora_lite.interop.safetensors_folder import SafetensorsFolder
from lora_lite.interop.sample_inputs import sample_inputs
from lora_lite.interop.verify import EPS
from lora_lite.merging.fold import relative
from lora_lite.runtime.coefficient import disabled, scale


@dataclass(frozen=True)
class LogitError:
    """Outputs on random inputs, against those of base and adapter.

    Attributes:
        error: ||z_merged - z|| / ||z|| of the model's first output.
        change: ||z_base - z|| / ||z||, what the adapter does; an error near it means that rounding swallows it.
        dtype: what both were computed in.
    """

    error: float
    change: float
    dtype: str

    def __str__(self) -> str:
        told = f"loaded by transformers, its outputs differ by {self.error:.2g} from those of base and adapter"
        told += f" (the base's by {self.change:.2g}; in {self.dtype})"
        if self.error > self.change / 2:
            told += "\nthe adapter's change is hardly larger than the rounding of these weights: merge into wider ones"
        return told


@torch.no_grad()
def first_output(model: nn.Module) -> Tensor | None:
    """The model's first output on random inputs, in fp64 on the CPU; None where its config does not tell what it
    reads."""
    batch = sample_inputs(model)
    if batch is None:
        return None
    with eval_mode(model):
        outputs = [each for each in tensors_in(run(model, batch)) if each.is_floating_point()]
    return outputs[0].to("cpu", torch.float64)


def compare_folders(
    cls: Any, base: SafetensorsFolder, adapter: Path, merged: Path, c: float
) -> tuple[LogitError | None, str]:
    """Load base and adapter, then the merged folder, one after the other, and compare their first output.

    Computed in fp32 where that fits into memory, so that only the rounding of the weights differs; else as stored.

    Args:
        cls: the class that transformers loads both with. base, adapter, merged, c: what was merged.

    Returns:
        What was measured, or None and the reason.

    Raises:
        StateError: they differ by more than rounding.
    """
    stored = next(each.dtype for each in base.tensors.values() if each.dtype in EPS)
    values = sum(torch.Size(each.shape).numel() for each in base.tensors.values())
    room = available_bytes()
    fitting = [dtype for dtype in (torch.float32, stored) if 1.2 * values * dtype.itemsize + 2**28 < room]
    if not fitting:
        return None, f"the model needs about {values * stored.itemsize / 1e9:.1f} GB, and {room / 1e9:.1f} are free"
    dtype = fitting[0]
    model = cls.from_pretrained(base.where, dtype=dtype).eval()
    load(model, adapter)
    with scale(model, c):
        expected = first_output(model)
    with disabled(model):
        bare = first_output(model)
    del model
    gc.collect()
    model, loading = cls.from_pretrained(merged, dtype=dtype, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise StateError(
            f"merge: transformers misses {missing[0]} in what was written; nothing was written to {merged}"
        )
    found = first_output(model)
    if expected is None or bare is None or found is None:
        return None, "nothing tells what the model reads"
    agreement = LogitError(relative(found, expected), relative(bare, expected), str(dtype).removeprefix("torch."))
    if not agreement.error <= 10 * max(EPS[stored], EPS[dtype]):
        raise StateError(
            f"merge: what was merged computes something else than base and adapter: outputs differ by "
            f"{agreement.error:.2g} (the base's by {agreement.change:.2g}); nothing was written"
        )
    return agreement, ""


def available_bytes() -> float:
    """How much memory is free, as far as the system says; infinity where it does not."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        [kilobytes] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return float("inf")
    return 1024.0 * int(kilobytes)
