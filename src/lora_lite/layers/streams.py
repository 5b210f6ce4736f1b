"""Residual streams: how wide each tower's or stage's is, and which layers read from one or write to one."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

# Which square layers (d_model -> d_model) write into the residual stream: the usual names of attention outputs and of
# second MLP layers. All other square layers read.
WRITER_NAMES = re.compile(
    r"(^|[._])(o|o_proj|out_proj|c_proj|out|wo|to_out|fc2|w2|down_proj|dense_4h_to_h|proj_out|linear2|out_lin|lin2)"
    r"(\.\d+)?$|(attention|attn|output|self)\.(dense|proj)$|mlp\.proj$"
)
D_MODEL_FIELDS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")


def d_model_of(module: nn.Module) -> int | None:
    """Width of the residual stream according to `module.config` (its text part, if it has several)."""
    config: Any = getattr(module, "config", None)
    get_text = getattr(config, "get_text_config", None)
    try:
        text = get_text() if callable(get_text) else None
    except ValueError:  # transformers' way to say that there are several
        text = None
    for source in (text, config):
        for field in D_MODEL_FIELDS:
            if isinstance(value := getattr(source, field, None), int):
                return value
    return None


class Streams:
    """The widths of the residual streams that each linear layer of a model may read or write.

    A layer within a *block* (an item of a list of modules that holds norms) has one: what the nearest config around it
    declares, where a norm of the block has that width; else, as in a tower without a config or a stage of another
    width, the norms' width that most layers of the block read or write. A layer outside of blocks (a projector, a
    downsampling layer, a head) has all that the model has.

    Args:
        model: the model.
        shapes: path -> (i, o) of its linear layers.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
        modules = dict(model.named_modules())
        declared = {path: width for path, module in modules.items() if (width := d_model_of(module)) is not None}
        norms = {path: width for path, module in modules.items() if (width := norm_width(module)) is not None}
        held = _held(norms, {path for path in modules if _is_item(modules, path)})
        stages = {above for item in held for above in _above(item)}
        members: dict[str | None, list[str]] = {}
        for path in shapes:
            block = next((above for above in _above(path) if above in held), None)
            members.setdefault(None if block in stages else block, []).append(path)
        self._of: dict[str, frozenset[int]] = {}
        for block, paths in members.items():
            around = [block, *_above(block), ""] if block is not None else []
            nearest = next((declared[above] for above in around if above in declared), None)
            width = _width(nearest, held[block], [shapes[path] for path in paths]) if block is not None else None
            self._of |= dict.fromkeys(paths, frozenset([width])) if width is not None else {}
        self._all = frozenset().union(declared.values(), *self._of.values())
        self.known = bool(declared)

    def __getitem__(self, path: str) -> frozenset[int]:
        return self._of.get(path, self._all)


def role(path: str, i: int, o: int, streams: Iterable[int]) -> str:
    """ "reader" (stream -> other), "writer" (other -> stream) or "inner"; names decide for layers that do both."""
    streams = frozenset(streams)
    reads, writes = i in streams, o in streams
    if reads and writes:
        return "writer" if WRITER_NAMES.search(path) else "reader"
    return "reader" if reads else "writer" if writes else "inner"


def norm_width(module: nn.Module) -> int | None:
    """The number of features that a norm normalises (or scales); None for what is no norm."""
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple | list) and shape and isinstance(shape[-1], int):
        return shape[-1]
    weight = module._parameters.get("weight")
    plain = module._parameters.keys() <= {"weight", "bias"} and not module._modules
    return weight.numel() if weight is not None and plain and weight.ndim == 1 and weight.numel() > 1 else None


def _above(path: str) -> list[str]:
    """The modules around `path`, the innermost first, the root ("") left out."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _is_item(modules: Mapping[str, nn.Module], path: str) -> bool:
    return isinstance(modules.get(path.rpartition(".")[0]), nn.ModuleList | nn.Sequential)


def _held(norms: Mapping[str, int], items: set[str]) -> dict[str, Counter[int]]:
    """The widths of the norms within each list item; an item that is a norm itself is none."""
    held: dict[str, Counter[int]] = {}
    for path, width in norms.items():
        for above in _above(path):
            if above in items:
                held.setdefault(above, Counter())[width] += 1
    return held


def _width(declared: int | None, norms: Mapping[int, int], shapes: Iterable[tuple[int, int]]) -> int | None:
    """The width of a block's stream; None where no layer of it touches any that its norms have."""
    touching = Counter(width for i, o in shapes for width in {i, o} if width in norms)
    if declared in touching or not touching:
        return declared
    return max(touching, key=lambda width: (touching[width], width))
