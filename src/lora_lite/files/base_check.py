"""What a file remembers of the base, and whether a model at hand is that base.

Of each adapted layer it is W z for a random z, of every other parameter some of its values: a new random head, which
no adapter acts on and no file holds, is then distinguished from another one.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.calibration.statistics import generator
from lora_lite.errors import BaseMismatchError, LoraLiteWarning, StateError
from lora_lite.layers.linear import dense, shape
from lora_lite.layers.targets import Target
from lora_lite.numerics import full_precision
from lora_lite.patterns import LONGEST
from lora_lite.runtime.attachment import is_adapters_key
from lora_lite.runtime.base_values import Samples, base_samples, moved_parameters
from lora_lite.runtime.state import State, trained_also

SKETCH_ROWS = 64
# On SmolLM2, worst of 210 layers: bf16 1.000, int8 1.000, nf4 0.990, fp4 0.981, changed by 10% 0.990, by 30% 0.916;
# weights of other models at most 0.45 (docs/LOG.md).
SKETCH_COSINE = 0.8
# ||s - s'|| / max(||s||, ||s'||) of neighbouring samples: sqrt(2) for independent ones, 1 where one of them is zero.
SAMPLE_DISTANCE = 0.8
NEIGHBOURS = 4  # compared together, so that new rows at the end of an embedding are not lost among the others


def base_name(root: nn.Module) -> str:
    """What people call the base: the hub id or the last part of the folder that it came from, else its class."""
    known = str(getattr(getattr(root, "config", None), "_name_or_path", "") or "")
    if Path(known).is_absolute():  # of this machine, and nobody else's business
        known = Path(known).name
    return (known or type(root).__name__)[:LONGEST]


def warn_other_name(root: nn.Module, name: str) -> None:
    """Warn where a file that holds nothing else of its base names another one than this model."""
    here, there = base_name(root), Path(name).name
    if name and here != type(root).__name__ and Path(here).name != there:
        warnings.warn(
            f"the adapter was trained on {name!r}, and this model is called {here!r}; nothing else tells them apart",
            LoraLiteWarning,
            stacklevel=3,
        )


def sketch(layer: nn.Module, path: str) -> Tensor:
    """W z on up to 64 evenly spaced rows, for one z seeded by the path: what distinguishes base models."""
    i, o = shape(layer)
    rows = torch.linspace(0, o - 1, min(o, SKETCH_ROWS)).round().long()
    z = torch.randn(i, generator=generator(0, path), dtype=torch.float32, device="cpu")
    with full_precision(torch.device("cpu")):
        return dense(layer)[rows.to(layer.weight.device)].to("cpu", torch.float32) @ z  # type: ignore[union-attr, arg-type]


def samples(root: nn.Module, state: State, targets: Iterable[str], also: Iterable[str]) -> Samples:
    """Of the base's samples, as they were when the first adapter was attached, those that a file remembers.

    The weights of `targets` have sketches, and the file holds the values of those named in `also`.
    """
    named = dict(root.named_parameters(remove_duplicate=False))
    sketched = {f"{path}.weight" for path in targets}
    held = {id(named[key]) for key in also if key in named}  # a tied parameter has another name below
    taken = base_samples(root, state)
    return {key: each for key, each in taken.items() if key not in sketched and id(named.get(key)) not in held}


def refuse_lost(root: nn.Module, state: State) -> None:
    """Refuse to save while the base trains something that no adapter's file would hold."""
    held = {id(p) for each in state.adapters for p in trained_also(root, each).values()}
    wanting = {key: p for key, p in root.named_parameters() if p.requires_grad and id(p) not in held}
    moved = [key for key in moved_parameters(root, state) if id(root.get_parameter(key)) not in held]
    if moved:
        raise StateError(
            f"save: {moved[0]} has changed since attach, but belongs to no adapter, so that no file would hold its new "
            f"values (of {len(moved)} such parameters). Name it in attach(train_also=...), or put its old values back"
        )
    if lost := [key for key in wanting if not is_adapters_key(key, root)]:
        raise StateError(
            f"save: {lost[0]} requires a gradient, but belongs to no adapter, so that no file would hold what it "
            f"learns (of {len(lost)} such parameters). Name it in attach(train_also=...), or freeze it "
            "(requires_grad_(False)) if it does not train, or you keep it yourself"
        )


def refuse_another_base(
    where: Any, root: nn.Module, state: State, targets: Iterable[Target], also: Iterable[str], known: Any
) -> None:
    """Raise `BaseMismatchError` if the model is not the base that a file was made on.

    Args:
        where: the file, for the message.
        root, state: the model.
        targets: the layers that the file has adapters for.
        also: names of the parameters that the file holds.
        known: what the file remembers, (sketches by path, samples by name). Parameters that only one of the two models
            has, or has in another shape, are not compared: a backbone may serve under several heads.
    """
    sketches, sampled = known
    cosines = {each.path: cosine(each.layer, each.path, sketches[each.path]) for each in targets}
    refuse_other_layers(where, cosines, "load(..., base='any') skips this check")
    refuse_other_values(where, samples(root, state, sketches, also), sampled)


def cosine(layer: nn.Module, path: str, there: Tensor) -> float:
    """How far a layer's sketch points in the direction of another one, `there`; -1 where that cannot be said."""
    here = sketch(layer, path)
    same = torch.equal(here, there)  # also covers weights that are zero
    return 1.0 if same else float(torch.cosine_similarity(here, there, dim=0).nan_to_num(nan=-1.0))


def refuse_other_layers(where: Any, cosines: Mapping[str, float], fix: str) -> None:
    """Raise `BaseMismatchError` if the sketch of a layer points elsewhere than in the file.

    cosines: by path. fix: what to do, for the message.
    """
    worst = min(cosines, key=lambda path: cosines[path])
    if not cosines[worst] >= SKETCH_COSINE:
        raise BaseMismatchError(
            f"{where}: was trained on another base model; worst layer {worst}, cosine {cosines[worst]:.2f} < "
            f"{SKETCH_COSINE} ({fix})"
        )


def refuse_other_values(where: Any, here: Samples, there: Samples) -> None:
    """Raise `BaseMismatchError` if a parameter that both have in one shape has other values here than in the file."""
    for key in [key for key in here if key in there]:
        (mine, shape_here), (theirs, shape_there) = here[key], there[key]
        if shape_here == shape_there and not _distance(mine, theirs) <= SAMPLE_DISTANCE:
            raise BaseMismatchError(
                f"{where}: {key}, which the file does not hold, has other values here than where it was trained (a "
                "new, random head?); load the model that it was trained on, train it with attach(train_also=...), or "
                "skip this check with load(..., base='any')"
            )


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest distance of neighbouring samples, relative to their size or to that of all samples, if larger."""
    typical = max(float(one.norm()), float(other.norm())) * (NEIGHBOURS / max(len(one), NEIGHBOURS)) ** 0.5
    parts = zip(one.split(NEIGHBOURS), other.split(NEIGHBOURS), strict=True)
    sizes = [(float((a - b).norm()), max(float(a.norm()), float(b.norm()), typical / 2)) for a, b in parts]
    return max((away / size for away, size in sizes if size), default=0.0)
