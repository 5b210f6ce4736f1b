"""The training loop: AdamW, warm-up and cosine, clipping, accumulation, and checkpoints that resume to the same bits.

Everything that a step depends on is a function of its number and of what the checkpoint holds: the batch order, the
learning rate, the adapter, the optimiser's moments and the random state. So a run that was killed and resumed on the
same machine ends with the same bits as one that was not.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import lora_lite as ll
from lora_lite.lab.training.checkpoints import (
    ADAPTER,
    fingerprint,
    last_checkpoint,
    read_progress,
    restore_optimizer,
    save_checkpoint,
)
from lora_lite.lab.training.data import BatchOrder, Encoded, answer_loss, collate, require_positions


class TrainingError(ll.LoraLiteError, RuntimeError):
    """Training cannot go on: the loss is not finite, an adapter never ran, or a checkpoint is of another run."""


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


def learning_rate(cfg: TrainConfig, peak: float, step: int) -> float:
    """The rate of step `step` (0, 1, ...): a linear rise to `peak`, then a cosine down to `final_lr * peak`."""
    warm = round(cfg.warmup * cfg.steps)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(cfg.steps - warm, 1)
    return peak * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: PreTrainedModel,
    items: Sequence[Encoded],
    pad: int,
    cfg: TrainConfig,
    folder: Path | None = None,
    resume: bool = False,
    name: str = "default",
    on_step: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train the adapter `name` of `model` on `items`.

    Args:
        model: a causal language model with an attached adapter (with `resume`: the bare base).
        items: encoded examples. pad: token id to pad with.
        folder: where checkpoints go, every `cfg.save_every` steps. None: none are written.
        resume: go on from the last whole checkpoint in `folder`, if there is one.
        on_step: called after each step.
    Raises:
        TrainingError: a loss that is not finite, an adapter that never ran, or a checkpoint of another run.
        CheckpointWriteError: no room for a checkpoint; the one before it is still there.
    """
    require_positions(model, max(map(len, items), default=0), "the longest example")
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    found = last_checkpoint(folder) if folder is not None and resume else None
    att = ll.load(model, found / ADAPTER, name=name, overwrite=True) if found else ll.attachment(model, name)
    peak = cfg.lr if cfg.lr is not None else next(iter(att.targets.values())).lr
    optimizer = _optimizer(model, cfg, peak, name)
    set_seed(cfg.seed)
    progress = _restore(found, optimizer, cfg, items) if found else Progress()
    wrapped = accelerator.prepare_model(model)
    order = BatchOrder([len(item) for item in items], cfg.batch_size, cfg.seed)
    model.train()
    with tqdm(total=cfg.steps, initial=progress.step, desc="train", unit="step") as bar:
        while progress.step < cfg.steps:
            started = time.perf_counter()
            progress.rate = learning_rate(cfg, peak, progress.step)
            batch = [items[index] for index in order.batch(progress.step)]
            loss = _step(accelerator, wrapped, batch, pad, cfg)
            if progress.step == 0:
                _refuse_idle(att)
            progress.grad_norm = _update(accelerator, optimizer, progress.rate, cfg.clip)
            _note(progress, loss, batch, time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.3f}, {progress.tokens / progress.seconds:,.0f} tokens/s")
            bar.update()
            due = cfg.save_every and progress.step % cfg.save_every == 0
            if folder is not None and due and accelerator.is_main_process:
                save_checkpoint(folder, model, name, optimizer, progress, cfg, items)
            if on_step is not None:
                on_step(progress)
    model.eval()
    return progress


def _step(accelerator: Accelerator, model: Any, batch: Sequence[Encoded], pad: int, cfg: TrainConfig) -> float:
    """Forward and backward over a batch, in `accumulation` parts; the mean loss of its answer tokens.

    Every answer token of the whole batch weighs the same, whichever process and part it falls to: DDP takes the mean of
    the processes' gradients, so each gives `num_processes` times its share of the sum. A process that a small batch
    leaves without an example reads the first one with weight 0, for the others wait for its gradients.
    """
    processes, total = accelerator.num_processes, sum(len(item.answer) for item in batch)
    mine = batch[accelerator.process_index :: processes]
    weight = processes / total if mine else 0.0
    mine = mine or batch[:1]
    size = math.ceil(len(mine) / cfg.accumulation)
    share = torch.zeros((), device=accelerator.device)
    for start in range(0, len(mine), size):
        inputs = {key: value.to(accelerator.device) for key, value in collate(mine[start : start + size], pad).items()}
        # The gradients are exchanged once, with the last part: processes may have unequal numbers of parts.
        with nullcontext() if start + size >= len(mine) else accelerator.no_sync(model):
            loss, count = answer_loss(model, inputs)
            (loss * (count * weight)).backward()
        share += loss.detach() * (count * weight / processes)
    mean = float(accelerator.reduce(share, "sum"))  # pyright: ignore[reportArgumentType]
    if not math.isfinite(mean):  # asked of the sum, so that all processes stop together
        model.zero_grad()
        raise TrainingError(f"the loss is {mean}: lower the learning rate, or look at the data")
    return mean


def _optimizer(model: PreTrainedModel, cfg: TrainConfig, peak: float, name: str) -> torch.optim.Optimizer:
    """AdamW over the adapter's tensors; each group knows its ratio to the schedule's rate."""
    optimizer = torch.optim.AdamW(ll.param_groups(model, peak, cfg.weight_decay, cfg.lora_plus_ratio, names=[name]))
    for group in optimizer.param_groups:
        group["ratio"] = group["lr"] / peak
    return optimizer


def _update(accelerator: Accelerator, optimizer: torch.optim.Optimizer, rate: float, clip: float) -> float:
    """Clip the gradient, take the optimiser's step at `rate`, clear; the gradient's norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = group["ratio"] * rate
    norm = accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)  # pyright: ignore[reportArgumentType]  (None with DeepSpeed alone, which is not used here)


def _refuse_idle(att: ll.Attachment) -> None:
    silent = [path for path, adapter in att.targets.items() if all(p.grad is None for p in adapter.parameters())]
    idle = [path for path in silent if ".experts." not in path]  # an expert may get no token in a step
    if idle:
        raise TrainingError(
            f"{len(idle)} of {len(att.targets)} adapters never ran, such as {idle[0]}: the model uses that weight "
            "without calling the layer; leave it out with exclude_names"
        )


def _note(progress: Progress, loss: float, batch: Sequence[Encoded], seconds: float) -> None:
    progress.losses.append(loss)
    progress.tokens += sum(len(item) for item in batch)
    progress.answer_tokens += sum(len(item.answer) for item in batch)
    progress.seconds += seconds


def _restore(found: Path, optimizer: torch.optim.Optimizer, cfg: TrainConfig, items: Sequence[Encoded]) -> Progress:
    record, its = read_progress(found)
    if its != fingerprint(cfg, items):
        raise TrainingError(
            f"{found} is of a run with other settings or data; resume with the same ones, or train in another folder"
        )
    restore_optimizer(found, optimizer)
    return Progress(**record)
