"""Adapters that training passes leave out: their weight is read without calling the layer, so that they never learn."""

import re
import warnings

from torch import nn

from lora_lite.errors import LoraLiteWarning
from lora_lite.runtime.context import Call
from lora_lite.runtime.state import State, adapters_of

EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")  # which tokens reach an expert is not ours to say
PASSES = 4  # in a row, since models may leave out layers by chance (layer drop), and batches the images


def note_skipped(root: nn.Module, state: State, call: Call) -> None:
    """Count, after a training pass, the adapters that did not run in it, and warn of each once after a few."""
    if len(call.ran) >= sum(len(attached.targets) for attached in state.adapters.values()):
        state.skipped.clear()
        return
    missed = {
        (name, path)
        for name in state.adapters
        for path, adapter in adapters_of(root, name).items()
        if id(adapter) not in call.ran and adapter.facts.trained and not adapter.merged and not EXPERT.search(path)
    }
    counts = {each: state.skipped.get(each, 0) + 1 for each in missed}
    state.skipped = counts
    if silent := [path for (_, path), count in counts.items() if count == PASSES]:
        warnings.warn(
            f"{len(silent)} adapters did not run in the last {PASSES} training passes, such as that on {silent[0]}: "
            "the model reads its weight without calling the layer (a fused loss?), or the batches do not reach it, so "
            "it does not learn; leave it out with exclude_names, or turn off what fuses it",
            LoraLiteWarning,
            stacklevel=2,
        )
