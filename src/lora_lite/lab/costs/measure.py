"""Costs that only running shows: time beside the frozen base, memory in a fresh process, attaching, loading.

As a program (`python -m lora_lite.lab.costs.measure JSON`) it is that fresh process: it makes one step and prints its
peak.
"""

import contextlib
import copy
import functools
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import lora_lite as ll
from lora_lite.batches import eval_mode
from lora_lite.errors import LoraLiteError
from lora_lite.lab.costs.rows import ArmCost, MeasuredWith, Span, Times
from lora_lite.lab.models.base import Base
from lora_lite.lab.provenance import provenance
from lora_lite.registry import method_of
from lora_lite.runtime.attach_cost import peak_memory_mb

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what makes Linux start the peak of resident memory again


class MeasureError(LoraLiteError, RuntimeError):
    """The process that measures memory failed."""


@dataclass(frozen=True)
class Workload:
    """What is run to measure.

    Attributes:
        batch_size, tokens: rows of a batch, and tokens of each; random ones, no padding.
        rounds: times that base and arm take turns. Each gives one ratio.
        calibration_batches: batches for methods that need data.
    """

    batch_size: int = 2
    tokens: int = 64
    rounds: int = 7
    calibration_batches: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1 + (name == "tokens"):
                raise ValueError(f"Workload.{name} = {value}: must be an integer >= {1 + (name == 'tokens')}")

    def ids(self, model: PreTrainedModel, seed: int = 0) -> Tensor:
        """Token ids of a batch (batch_size, tokens)."""
        rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, arg-type, index]
        rng = torch.Generator().manual_seed(seed)
        return torch.randint(0, rows, (self.batch_size, self.tokens), generator=rng).to(model.device)

    def calibration(self, model: PreTrainedModel, configs: Sequence[ll.AdapterConfig]) -> Any:
        """Batches for methods that need them; two sets for a contrast."""
        needs = {need for cfg in configs for need in method_of(cfg).needs(cfg)}
        batches = [{"input_ids": self.ids(model, 1 + seed)} for seed in range(2 * self.calibration_batches)]
        if any(need.startswith("contrast") for need in needs):
            return ll.Contrast(batches[::2], batches[1::2])
        return batches[::2] if needs else None


def measure_arm(base: Base, configs: Sequence[ll.AdapterConfig], workload: Workload | None = None) -> ArmCost:
    """Attach, time, save, load, and meter one arm beside the frozen base.

    Base and arm are two trees of modules over the same weights, in one process, and take turns; each round gives a
    ratio, whose median and quartiles are reported. "forward": without gradients, in eval mode. "step": forward and
    backward, in train mode, of the same loss on the same input embeddings. The frozen base has no parameter to train,
    so its backward pass is with respect to the input embeddings, and goes through every layer as an arm's does.
    "tokens_per_second": of such a step of the arm with the optimiser's (AdamW). A method that is not trained has
    neither.

    Raises:
        ModelError, TargetError, CalibrationError: as `load_model` and `attach` say. MeasureError: no memory figure.
    """
    workload = workload or Workload()
    model, _ = base.load()
    arm = twin_tree(model)
    att = ll.attach(arm, configs, workload.calibration(arm, configs))
    trainable, targets = att.num_trainable, len(att.targets)
    attach_seconds = att.cost.seconds if att.cost is not None else {}
    with tempfile.TemporaryDirectory() as folder:
        file = ll.save(arm, Path(folder) / "adapter.safetensors")
        size = file.stat().st_size
        times = _times(model, arm, workload, trainable > 0)
        started = time.perf_counter()
        ll.load(model, file)
        synchronize(base.device)
        load_seconds = time.perf_counter() - started
        del model, arm, att
        gc.collect()  # the children need the memory
        base_memory = base_peak(base, workload)
        memory = child_peak(base, workload, str(file)) if trainable else None
    return {
        "trainable": trainable,
        "targets": targets,
        "attach_seconds": attach_seconds,
        "stored_bytes": size,
        **times,
        "load_seconds": load_seconds,
        "base_peak_memory_mb": base_memory,
        "peak_memory_mb": memory,
        "measured_with": MeasuredWith(
            model=base.model, dtype=base.dtype_name, quantization=base.quantization, **asdict(workload)
        ),
        "provenance": provenance(base.device),
    }


def twin_tree(model: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules over the same weights and buffers: adapters on one do not show on the other."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


# ---- time


def _times(base: PreTrainedModel, arm: PreTrainedModel, workload: Workload, trained: bool) -> Times:
    contestants: dict[str, Callable[[], Any]] = {
        "base forward": lambda: forward(base, ids),
        "forward": lambda: forward(arm, ids),
    }
    if trained:
        # A rate of 0: the work of a step without its effect, so that every round computes the same.
        optimizer = torch.optim.AdamW(ll.param_groups(arm, lr=0.0))
        contestants |= {
            "base step": lambda: base_step(base, ids),
            "step": lambda: arm_step(arm, ids),
            "optimizer": optimizer.step,
        }
    ids = workload.ids(arm)
    seconds = take_turns(contestants, workload.rounds, arm.device)
    times: Times = {"forward": ratio(seconds["forward"], seconds["base forward"])}
    if trained:
        times["step"] = ratio(seconds["step"], seconds["base step"])
        whole = statistics.median(map(sum, zip(seconds["step"], seconds["optimizer"], strict=True)))
        times["tokens_per_second"] = ids.numel() / whole
    return times


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round: all run once to warm up, then `rounds` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(rounds + 1), desc="timing", unit="round", leave=False):
        for name, run in contestants.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> Span:
    """Median and quartiles of the rounds' ratios."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"mean": middle, "low": low, "high": high}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if the work is on one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward(model: PreTrainedModel, ids: Tensor) -> None:
    """A forward pass without gradients."""
    with eval_mode(model), torch.no_grad():
        model(input_ids=ids, use_cache=False)


def base_step(model: PreTrainedModel, ids: Tensor) -> None:
    """Forward and backward of a frozen model, with respect to the input embeddings."""
    _step(model, ids, requires_grad=True)


def arm_step(model: PreTrainedModel, ids: Tensor) -> None:
    """Forward and backward of an adapted model, with respect to its adapters; leaves their gradients."""
    model.zero_grad(set_to_none=True)
    _step(model, ids, requires_grad=False)


def _step(model: PreTrainedModel, ids: Tensor, requires_grad: bool) -> None:
    model.train()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    embedded = embedded.detach().requires_grad_(requires_grad)
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()


# ---- memory


@functools.cache
def base_peak(base: Base, workload: Workload) -> float:
    """`child_peak` of the frozen base, measured once for all arms."""
    return child_peak(base, workload)


def child_peak(base: Base, workload: Workload, adapter: str | None = None) -> float:
    """Peak memory (MB) of one training step in a fresh process, of the GPU where it runs on one.

    adapter: a file to load onto the base; its step is forward, backward and AdamW's. None: the base's step alone. What
    comes before the step (reading weights, loading the adapter) counts only where the system cannot start its peak
    again.
    """
    settings = {
        "base": {**asdict(base), "dtype": base.dtype_name, "device": str(base.device)},
        "workload": asdict(workload),
        "adapter": adapter,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "lora_lite.lab.costs.measure", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasureError(f"the process that measures memory ended with code {done.returncode}: {last}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_memory_mb"])


def main(argument: str) -> None:
    """Load, make one step, and print the peak of memory as JSON."""
    asked = json.loads(argument)
    torch.set_num_threads(asked["threads"])
    settings = asked["base"]
    dtype, device = getattr(torch, settings.pop("dtype")), torch.device(settings.pop("device"))
    model, _ = Base(dtype=dtype, device=device, **settings).load()
    ids = Workload(**asked["workload"]).ids(model)
    if asked["adapter"] is None:
        for p in model.parameters():
            p.requires_grad_(False)
        peak = step_peak(lambda: base_step(model, ids), device)
    else:
        ll.load(model, asked["adapter"])
        optimizer = torch.optim.AdamW(ll.param_groups(model, lr=0.0))
        peak = step_peak(lambda: (arm_step(model, ids), optimizer.step()), device)
    print(json.dumps({"peak_memory_mb": peak}))


def step_peak(step: Callable[[], Any], device: torch.device) -> float:
    """Peak memory (10^6 bytes) during a step: of the GPU, else resident memory of this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the process's
            CLEAR.write_text(RESET_PEAK)
    step()
    synchronize(device)
    # Not getrusage's figure on Linux: a process starts with the one of the process that started it.
    if device.type != "cuda" and STATUS.exists():
        peak = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
        if peak is not None:
            return int(peak[1]) * 1024 / 1e6
    return peak_memory_mb(device)


if __name__ == "__main__":
    main(sys.argv[1])
