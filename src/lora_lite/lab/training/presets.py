"""Named sets of defaults for `lora-lite train`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_lite.adapter import Adapter
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.progress import TrainConfig


@dataclass(frozen=True)
class Preset:
    """Defaults of a run.

    Attributes:
        about: one line for the help.
        methods: method -> settings of its config that differ from its own defaults.
        rates: method -> learning rate. Another method gets the upper end of its range where `rates` is not empty, for a
            short run cannot wait for the default.
    """

    about: str
    run: RunConfig = field(default_factory=RunConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    method: str = "lora"
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def training_of(self, cls: type[Adapter]) -> TrainConfig:
        """The training settings for a method."""
        rate = self.rates.get(cls.facts.name, cls.facts.lr_range[1]) if self.rates else cls.facts.lr
        return dataclasses.replace(self.training, lr=rate)


# Without the generator's fixed preamble a prompt takes half the tokens.
REVERSAL = r"word_sequence_reversal:drop=^.*after the comma\.\s*,min_words=3,max_words=5"

PRESETS = {
    "none": Preset("the defaults of every setting"),
    "demo": Preset(
        "the embedded model learns to reverse lists of words, in a few minutes on two CPU cores",
        run=RunConfig(task=REVERSAL, train_examples=256, test_examples=64),
        training=TrainConfig(steps=32, batch_size=8, final_lr=0.05, save_every=16),
        methods={"lora": {"r": 16, "alpha": 32.0}},
        rates={"lora": 2e-3, "antipasto": 2e-2},
    ),
}
