"""`lora-lite combine`: one adapter's file made of several."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import lora_lite as ll
from lora_lite.files.atomic import expanded
from lora_lite.lab import terminal
from lora_lite.lab.errors import RunError
from lora_lite.lab.models.devices import pick_device, pick_dtype
from lora_lite.lab.shared_flags import EVERYWHERE, Shared, TrustRemoteCode
from lora_lite.lab.talking.trained import Trained, look, open_model, put_on

COMBINE = (
    """Make one adapter of several that were trained on the same base: a plain LoRA, in a file of its own.

    lora-lite combine both.safetensors runs/words=0.7 runs/sums=0.3
    lora-lite combine both.safetensors a.safetensors b.safetensors --method ties --density 0.3 --rank 32

Each layer's share of the combination that the rank leaves out is measured and shown. Exit code: 0 done, 1 failed, 2
flags not understood, 130 interrupted.
"""
    + EVERYWHERE
)


@dataclass(frozen=True)
class CombineFlags:
    """What is made of what.

    Attributes:
        out: the new file.
        sources: files that `ll.save` or `lora-lite train` wrote, or folders of runs, each with its weight: FILE=0.7;
            without one it is 1.
        method: "sum": exactly; "svd": its best part of a rank; "ties": without small entries and those whose sign loses
            the vote; "dare": entries dropped at random.
        rank: most rank of a layer. None: "svd": the largest of the sources'; "ties", "dare": their sum.
        density: share of entries that "ties" and "dare" keep.
        seed: of what "dare" drops.
        model: the base: "smollm2" (embedded), a hub id or a local folder. None: the one that the runs or files name.
        quantization: of the base: "none", "4bit" or "8bit" (bitsandbytes).
        dtype: of the base: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.
        device: where to run. None: the GPU if there is one.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE=WEIGHT")]
    method: Literal["sum", "svd", "ties", "dare"] = "sum"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0
    model: str | None = None
    quantization: str = "none"
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: TrustRemoteCode = False


def combine(arguments: Sequence[str], shared: Shared) -> int:
    """Open the base, put the sources on it, combine them, and save what comes out."""
    asked = tyro.cli(CombineFlags, args=list(arguments), prog="lora-lite combine", description=COMBINE)
    found = [(look(path, asked.model, asked.trust_remote_code), weight) for path, weight in map(_source, asked.sources)]
    if not found:
        raise RunError("combine: no adapter was given; add them after OUT, as FILE=WEIGHT")
    _refuse_other_bases([trained for trained, _ in found])
    device = pick_device(asked.device)
    dtype = pick_dtype(asked.dtype, device)
    weights = {f"source{number}": weight for number, (_, weight) in enumerate(found, 1)}
    sources = dict(zip(weights, (trained for trained, _ in found), strict=True))
    for name, trained in sources.items():
        terminal.remark(f"{weights[name]:g} x {trained}")
    first, *others = sources
    model, _ = open_model(sources[first], dtype, device, asked.quantization, asked.trust_remote_code, first)
    for name in others:
        put_on(model, sources[name], name)
    made = ll.combine(model, weights, asked.method, asked.rank, asked.density, asked.seed)
    out = ll.save(model, expanded(asked.out), made.name)
    terminal.remark(made)
    terminal.remark(f"{out}: {out.stat().st_size:,} bytes")
    shared.say(
        {
            **{key: value for key, value in dataclasses.asdict(asked).items() if key not in ("out", "sources")},
            "out": str(out),
            "model": found[0][0].base,
            "sources": {str(trained.where): weight for trained, weight in found},
            "errors": made.errors,
        }
    )
    return 0


def _source(text: str) -> tuple[Path, float]:
    """The path and the weight of FILE=WEIGHT; 1 where the text is just a path."""
    path, equals, weight = text.rpartition("=")
    if not equals or expanded(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError as error:
        raise RunError(f"combine: the weight of {path} is {weight!r}; give a number, as in {path}=0.7") from error


def _refuse_other_bases(found: Sequence[Trained]) -> None:
    for each in found[1:]:
        if each.base != found[0].base:
            raise RunError(
                f"combine: {each.where} is of the base {each.base!r}, and {found[0].where} of {found[0].base!r}; only "
                "adapters of one base have a sum (where both are names of one, give it with --model)"
            )
