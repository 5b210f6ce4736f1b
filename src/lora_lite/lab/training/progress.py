"""How to train, and how far it has come."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch_size: examples a step, over all processes.
        accumulation: parts that a step's batch is cut into, to save memory.
        lr: peak learning rate. None: the method's own default.
        warmup: share of the steps over which the rate rises; afterwards it falls along a cosine.
        final_lr: where the cosine ends, as a share of lr.
        weight_decay: of tensors whose zero means no change (see `lora_lite.param_groups`).
        lora_plus_ratio: how many times lr the B of a LoRA learns with (LoRA+).
        clip: largest norm of the gradient.
        save_every: steps between checkpoints. 0: none.
        seed: of the batch order and of dropout.
    """

    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    lr: float | None = None
    warmup: float = 0.1
    final_lr: float = 0.0
    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0
    clip: float = 1.0
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("accumulation", 1), ("save_every", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"TrainConfig.{name} = {getattr(self, name)}: must be an integer >= {low}")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"TrainConfig.{name} = {getattr(self, name)}: must be in [0, 1]")
        if not self.clip > 0 or (self.lr is not None and not (0 < self.lr < math.inf)):
            raise ValueError(f"TrainConfig: lr = {self.lr} and clip = {self.clip} must be > 0")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"TrainConfig.accumulation = {self.accumulation}: must divide batch_size {self.batch_size}"
            )

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after so many steps."""
        return self.save_every > 0 and step % self.save_every == 0


@dataclass
class Progress:
    """What a run has done so far: what `train` returns, and what a checkpoint stores.

    Attributes:
        losses: mean answer loss of each step.
        tokens: tokens read, padding left out.
        answer_tokens: those among them that were learnt.
        seconds: time in the loop.
        rate: learning rate of the last step (of a group without a ratio of its own, such as LoRA+'s).
        grad_norm: norm of the last step's gradient, before clipping.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    grad_norm: float = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)
