"""`lora-lite export` and `lora-lite merge`: what was trained, for tools that do not know this library."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import lora_lite as ll
from lora_lite.files.atomic import expanded
from lora_lite.interop.merged_folder import MergedFolder, merge_folder
from lora_lite.lab import terminal
from lora_lite.lab.errors import RunError
from lora_lite.lab.models.base import Base
from lora_lite.lab.models.devices import pick_device, pick_dtype
from lora_lite.lab.models.quantized_merge import QuantizedMerge, merge_quantized
from lora_lite.lab.models.snapshot import local_folder
from lora_lite.lab.shared_flags import EVERYWHERE, Shared, TrustRemoteCode
from lora_lite.lab.talking.trained import Trained, look, open_model


@dataclass(frozen=True)
class ExportFlags:
    """What is exported, and as what.

    Attributes:
        adapter: a file that `ll.save` or `lora-lite train` wrote, or the folder of a run.
        out: a new folder, or that of an earlier export.
        to: the format: "peft" is read by peft, transformers, vLLM and SGLang.
        rank: at most this rank: the best such part of each layer's change, with its error measured. None: the exact
            change, where its rank is low or peft has a type for it.
        c: the coefficient to export at: 1 is the trained adapter.
        model: the base: "smollm2" (embedded), a hub id or a local folder. None: the one that the run or the file names.
        quantization: of the base: "none", "4bit" or "8bit" (bitsandbytes).
        dtype: of the base: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.
        device: where to run. None: the GPU if there is one.
    """

    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    to: Literal["peft"]
    rank: int | None = None
    c: float = 1.0
    model: str | None = None
    quantization: str = "none"
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: TrustRemoteCode = False

    def __post_init__(self) -> None:
        _require_finite(self.c)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank = {self.rank}: must be at least 1")


@dataclass(frozen=True)
class MergeFlags:
    """What is merged into what.

    Attributes:
        model: the base: a folder of transformers (safetensors), a hub id, or "smollm2" (embedded).
        adapter: a file that `ll.save` or `lora-lite train` wrote, or the folder of a run.
        out: a new folder.
        c: the coefficient to merge at: 1 is the trained adapter.
        check: load both models afterwards, if memory allows, and compare their outputs.
        quantization: "4bit" or "8bit" for an adapter that was trained on such a base (bitsandbytes): its outputs with
            that base are what both ways to merge are then measured against, in memory.
        weights: with --quantization: which weights are written: the "original" ones with the change, or the
            "dequantised" ones, whose outputs are those of training but for its rounding.
        dtype: with --quantization: what is computed in, and written for "dequantised": "float32", "bfloat16", "auto".
        device: with --quantization: where to run. None: the GPU if there is one.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    c: float = 1.0
    check: bool = True
    quantization: str = "none"
    weights: Literal["original", "dequantised"] = "original"
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: TrustRemoteCode = False

    def __post_init__(self) -> None:
        _require_finite(self.c)
        if self.quantization == "none" and self.weights == "dequantised":
            raise ValueError("weights = 'dequantised': there are none without --quantization 4bit or 8bit")


EXPORT = (
    """Write an adapter as a folder that other tools load.

    lora-lite export runs/demo-lora --to peft exported
    lora-lite export mine.safetensors --to peft exported --model Qwen/Qwen3-0.6B-Base --c 0.5
    lora-lite export runs/demo-dora --to peft exported --rank 16      plain LoRA, which servers take, and its error

Whatever the method, a change of low rank becomes plain LoRA, exactly; others become peft's own type, or with --rank
the best LoRA of that rank. What was written is loaded by peft and compared before it appears. Exit code: 0 done, 1
failed, 2 flags not understood, 130 interrupted.
"""
    + EVERYWHERE
)
MERGE = (
    """Write a model with the adapter merged into its weights: a folder that transformers loads by itself.

    lora-lite merge smollm2 runs/demo-lora merged
    lora-lite merge Qwen/Qwen3-0.6B-Base runs/qwen merged --c 0.5
    lora-lite merge models/base mine.safetensors merged --no-check    too large to load: one layer in memory at a time
    lora-lite merge models/base runs/qlora merged --quantization 4bit --weights dequantised

Shards stay shards, in their dtype; tokenizer, configs and code are copied. The rounding of each layer is measured,
and then the outputs of base and adapter against the merged folder's. Another base than the adapter's is refused. OUT
appears when it is whole, and not after an error. Exit code: 0 done, 1 failed, 2 flags not understood, 130 interrupted.
"""
    + EVERYWHERE
)


def export(arguments: Sequence[str], shared: Shared) -> int:
    """Write an adapter for other tools."""
    asked = tyro.cli(ExportFlags, args=list(arguments), prog="lora-lite export", description=EXPORT)
    trained = look(asked.adapter, asked.model, asked.trust_remote_code)
    terminal.remark(trained)
    device = pick_device(asked.device)
    dtype = pick_dtype(asked.dtype, device)
    model, _ = open_model(trained, dtype, device, asked.quantization, asked.trust_remote_code)
    with ll.scale(model, asked.c):
        done = ll.export_peft(model, expanded(asked.out), rank=asked.rank)
    terminal.line(terminal.console(), done)
    shared.say({**_summary(trained, asked.c), **dataclasses.asdict(done)})
    return 0


def merge(arguments: Sequence[str], shared: Shared) -> int:
    """Write a model with the adapter merged."""
    asked = tyro.cli(MergeFlags, args=list(arguments), prog="lora-lite merge", description=MERGE)
    trained = look(asked.adapter, asked.model, asked.trust_remote_code)
    terminal.remark(trained)
    out = expanded(asked.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} is there already; give a new folder")
    ways: QuantizedMerge | None = None
    if asked.quantization != "none":
        base = Base.of(asked, asked.device)
        ways = merge_quantized(base, trained.where, asked.c, out if asked.weights == "dequantised" else None)
        terminal.line(terminal.console(), ways)
    done: MergedFolder | None = None
    if asked.weights == "original":
        folder = local_folder(asked.model)
        done = merge_folder(folder, trained.where, out, asked.c, asked.check, asked.trust_remote_code)
        terminal.line(terminal.console(), done)
    parts: dict[str, Any] = {"quantized": ways and dataclasses.asdict(ways), "out": str(out)}
    shared.say({**_summary(trained, asked.c), **parts, **(dataclasses.asdict(done) if done else {})})
    return 0


def _summary(trained: Trained, c: float) -> dict[str, Any]:
    """What a line of JSON says of what was shipped."""
    return {"adapter": str(trained.where), "model": trained.base, "c": c}


def _require_finite(c: float) -> None:
    if not math.isfinite(c):
        raise ValueError(f"c = {c}: must be a finite number")
