"""The training loop: AdamW, warm-up and cosine, clipping, accumulation, and checkpoints that resume to the same bits.

Everything that a step depends on is a function of its number and of what the checkpoint holds: the batch order, the
learning rate, the adapter, the optimiser's moments and the random state. So a run that was killed and resumed on the
same machine ends with the same bits as one that was not.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from lora_lite.lab.training.data import BatchOrder, Encoded, answer_loss, collate
from lora_lite.lab.training.limits import require_fit
from lora_lite.lab.training.progress import Progress, TrainConfig


class TrainingError(ll.LoraLiteError, RuntimeError):
    """Training cannot go on: the loss is not finite, an adapter never ran, or a checkpoint is of another run."""


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
        resume: go on from the last whole checkpoint in `folder`, if there is one. on_step: called after each step.

    Raises:
        TrainingError: a loss that is not finite, an adapter that never ran, or a checkpoint of another run.
        CheckpointWriteError: no room for a checkpoint; the one before it is still there.
    """
    require_fit(model, items, "the longest example")
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    there = last_checkpoint(folder) if folder is not None and resume else None
    att = ll.load(model, there / ADAPTER, name=name, overwrite=True) if there else ll.attachment(model, name)
    peak = cfg.lr if cfg.lr is not None else next(iter(att.targets.values())).facts.lr
    optimizer = _optimizer(model, cfg, peak, name)
    set_seed(cfg.seed)
    progress = _restore(there, optimizer, cfg, items) if there else Progress()
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
            _show(bar, progress)
            if folder is not None and accelerator.is_main_process and cfg.saves_at(progress.step):
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
    share, inputs = torch.zeros((), device=accelerator.device), dict[str, torch.Tensor]()
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
        raise TrainingError(_why_not_finite(accelerator, model, inputs, mean))
    return mean


def _why_not_finite(accelerator: Accelerator, model: Any, inputs: dict[str, torch.Tensor], loss: float) -> str:
    """A loss that is not finite, and whether it is the base's own on these inputs: no rate would help."""
    bare = accelerator.unwrap_model(model)
    with torch.no_grad(), ll.disabled(bare):
        own = float(answer_loss(bare, inputs)[0])
    if math.isfinite(own):
        return f"the loss is {loss}: lower the learning rate, or look at the data"
    return (
        f"the base's own loss is {own}, without any adapter: its weights are damaged, or too large for the dtype "
        f"{str(bare.dtype).removeprefix('torch.')}; fetch the model again, or give --dtype float32"
    )


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


def _show(bar: tqdm, progress: Progress) -> None:
    bar.set_postfix_str(f"loss {progress.losses[-1]:.3f}, {progress.tokens / progress.seconds:,.0f} tokens/s")
    bar.update()


def _note(progress: Progress, loss: float, batch: Sequence[Encoded], seconds: float) -> None:
    progress.losses.append(loss)
    progress.tokens += sum(len(item) for item in batch)
    progress.answer_tokens += sum(len(item.answer) for item in batch)
    progress.seconds += seconds


def _restore(
    checkpoint: Path, optimizer: torch.optim.Optimizer, cfg: TrainConfig, items: Sequence[Encoded]
) -> Progress:
    progress, its = read_progress(checkpoint)
    if its != fingerprint(cfg, items):
        raise TrainingError(
            f"{checkpoint} is of a run with other settings or data; resume with the same ones, or train in another "
            "folder"
        )
    restore_optimizer(checkpoint, optimizer)
    return progress
