"""Named sets of defaults for `lora-lite train`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lite.adapter import Adapter
from lora_lite.lab.run import RunConfig
from lora_lite.lab.train import TrainConfig


@dataclass(frozen=True)
class Preset:
    """Defaults of a run.

    Attributes:
        about: one line for the help.
        methods: method -> settings of its config that differ from its own defaults.
        fast: use the upper end of the method's learning-rate range: a short run cannot wait for the default.
    """

    about: str
    run: RunConfig = field(default_factory=RunConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    method: str = "lora"
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fast: bool = False

    def training_of(self, cls: type[Adapter]) -> TrainConfig:
        """The training settings for a method."""
        return dataclasses.replace(self.training, lr=cls.lr_range[1] if self.fast else cls.lr)


PRESETS = {
    "none": Preset("the defaults of every setting"),
    "demo": Preset(
        "the embedded model learns a task in a few minutes on two CPU cores",
        run=RunConfig(task="word_sequence_reversal:min_words=3,max_words=8", out=Path("runs/demo")),
        training=TrainConfig(steps=60, batch_size=16),
        fast=True,
    ),
}
