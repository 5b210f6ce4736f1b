"""Which layers a config adapts: filter by name, layer index and exclusion first, then classify by shape."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_lite.config import DEFAULT_EXCLUDE, AdapterConfig, Default
from lora_lite.errors import TargetError
from lora_lite.layers.linear import is_linear, is_read_uncalled, shape, unknown_kinds
from lora_lite.layers.streams import D_MODEL_FIELDS, Streams, d_model_of
from lora_lite.layers.streams import role as role_of
from lora_lite.patterns import matches, near_misses, spells

__all__ = [
    "Candidate",
    "Selection",
    "Target",
    "candidates",
    "d_model_of",
    "near_misses",
    "role",
    "select",
    "selection",
    "uncovered",
]


@dataclass(frozen=True)
class Candidate:
    """A linear layer of the model, by its path; `index` is that of the repeated block it lies in (None: in none)."""

    path: str
    layer: nn.Module
    i: int
    o: int
    index: int | None = None


@dataclass(frozen=True)
class Selection:
    """What a config selects in a model.

    Attributes:
        layers: module path -> layer.
        matched: each of the names that the config gives -> how many layers it adapts.
        left_out: paths of layers that a default leaves out unasked, heads and embeddings aside: they neither read nor
            write a residual stream (naming them adapts them), or their weight is read without calling them.
        unspelled: paths of heads that a regex of the config matches, but does not spell, so that they stay left out.
    """

    layers: dict[str, nn.Module]
    matched: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict)
    unspelled: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that is to carry an adapter, and what attaching or loading knows of it so far.

    Attributes:
        path, layer: the layer, by its path.
        shape: (i, o).
        index: the place of its config among those that were given.
        cfg: its config: the one that was given, then its own (`Adapter.plan`).
        stats: what calibration saw of it; None where its method needs nothing, or before.
        adapter: its `Adapter`; None before.
    """

    path: str
    layer: nn.Module
    shape: tuple[int, int]
    index: int
    cfg: AdapterConfig
    stats: Any = None
    adapter: Any = None


def candidates(model: nn.Module) -> list[Candidate]:
    """Every linear layer of the model, in the order of `named_modules`; adapters themselves hold none."""
    modules = dict(model.named_modules())
    paths = [path for path, module in modules.items() if path and is_linear(module)]
    indices = _indices(modules, paths)
    return [Candidate(path, modules[path], *shape(modules[path]), indices[path]) for path in paths]


def _indices(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, int | None]:
    """The layer index of each path: its place in the outermost list of repeated blocks around it.

    In a model without such a list it is the first integer of the path.
    """
    lists = {path: kind for path, module in modules.items() if (kind := _repeats(module)) is not None}
    found: dict[str, int | None] = {}
    for path in paths:
        parts = path.split(".")
        around = [above for n in range(len(parts)) if (above := ".".join(parts[:n])) in lists]
        of = next((above for above in around if lists[above]), next(iter(around), None))  # a ModuleList first
        if of is not None:
            child = parts[of.count(".") + 1 if of else 0]
            found[path] = list(modules[of]._modules).index(child)
    if found:
        return {path: found.get(path) for path in paths}
    return {path: next((int(part) for part in path.split(".") if part.isdigit()), None) for path in paths}


def _repeats(module: nn.Module) -> bool | None:
    """Whether `module` lists a model's repeated blocks: True for a ModuleList of them, False for a Sequential, None for
    what is neither. Blocks are modules of modules, and in a ModuleList (of one, or where a kind comes twice) they need
    not all be of a kind, as in hybrids of attention and state spaces."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return None
    kinds = [type(child) for child in module if child._modules and not is_linear(child)]
    if len(kinds) < len(module) or not kinds:
        return None
    if isinstance(module, nn.ModuleList):
        return True if len(kinds) == 1 or len(set(kinds)) < len(kinds) else None
    return False if len(kinds) > 1 and len(set(kinds)) == 1 else None


def role(candidate: Candidate, *d_model: int) -> str:
    """ "reader", "writer" or "inner" of a layer beside streams of these widths."""
    return role_of(candidate.path, candidate.i, candidate.o, d_model)


def select(model: nn.Module, cfg: AdapterConfig) -> dict[str, nn.Module]:
    """The target layers of `cfg` in `model`, by path. Raises as `selection` does."""
    return selection(model, cfg).layers


def selection(model: nn.Module, cfg: AdapterConfig) -> Selection:
    """Which layers `cfg` selects in `model`, and what was left out.

    Names that the config gives go before its defaults: what they name is adapted whatever its role, and so is a head.
    Roles and exclusions that are given as well act on what the names leave.

    Raises:
        TargetError: a pattern or layer index that matches nothing, an unknown d_model, or no target at all. The message
            lists near misses, and the kinds of layer that were not understood.
    """
    try:
        return _select(model, cfg)
    except TargetError as error:
        if not (kinds := unknown_kinds(model)):
            raise
        seen = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise TargetError(
            f"{error}. Not understood, since they have no 2-D weight to read or return no tensor: {seen}"
        ) from error


def _select(model: nn.Module, cfg: AdapterConfig) -> Selection:
    everything = candidates(model)
    if not everything:
        raise TargetError(f"{type(model).__name__} has no linear layer (in_features, out_features and a 2-D weight)")
    _every_pattern_matches(everything, cfg, model)
    names = () if isinstance(cfg.target_names, Default) else cfg.target_names
    kept = [c for c in everything if not cfg.target_names or any(matches(p, c.path) for p in cfg.target_names)]
    if cfg.layers is not None:
        kept = [c for c in kept if c.index in cfg.layers]
    kept, excluded = _exclude(model, cfg, kept, names)
    uncalled = [c for c in kept if is_read_uncalled(c.layer) and not any(spells(name, c.path) for name in names)]
    kept = [c for c in kept if c not in uncalled]
    roles: dict[str, str] = {}
    asked = () if names and isinstance(cfg.target_roles, Default) else cfg.target_roles
    if asked:
        roles = _roles(model, cfg, everything, kept)
    chosen = [c for c in kept if not asked or roles[c.path] in asked]
    if not chosen:
        raise TargetError(_nothing_left(everything, excluded, roles, cfg))
    matched = {name: sum(matches(name, c.path) for c in chosen) for name in names}
    if dropped := [name for name, count in matched.items() if not count]:
        raise TargetError(
            f"{type(cfg).__name__}: target_names has {dropped[0]!r}, but the config's own layers, exclude_names or "
            "target_roles leave out every layer of that name; take the name away, or widen those"
        )
    unasked = isinstance(cfg.target_roles, Default) and asked
    left_out = {c.path: (c.i, c.o) for c in kept if unasked and roles[c.path] == "inner"}
    left_out |= {c.path: (c.i, c.o) for c in uncalled}
    unspelled = tuple(c.path for c in excluded) if names and isinstance(cfg.exclude_names, Default) else ()
    return Selection({c.path: c.layer for c in chosen}, matched, left_out, unspelled)


def left_out(selections: Sequence[Selection]) -> dict[str, str]:
    """The layers that defaults left out of all of some selections: path -> its path and shape."""
    found = {path: f"{path} ({i} -> {o})" for each in selections for path, (i, o) in each.left_out.items()}
    found |= {path: path for each in selections for path in each.unspelled}
    return {path: words for path, words in found.items() if not any(path in each.layers for each in selections)}


def left_out_words(selections: Sequence[Selection]) -> str:
    """A sentence about `left_out`; empty where nothing was."""
    found = list(left_out(selections).values())
    if not found:
        return ""
    return (
        f"{len(found)} linear layers left out by default, for instance {', '.join(found[:2])}: they neither read nor "
        "write a residual stream, are a head, or are never called (nn.MultiheadAttention's out_proj); name them in "
        "target_names to adapt them, or give target_roles and exclude_names to leave them out"
    )


def _exclude(
    model: nn.Module, cfg: AdapterConfig, kept: list[Candidate], names: Iterable[str]
) -> tuple[list[Candidate], list[Candidate]]:
    """What `exclude_names` leaves, and what it takes away; the default gives way to names that spell a layer."""
    heads = _heads(model, cfg)
    excluded = [c for c in kept if c.layer in heads or any(matches(p, c.path) for p in cfg.exclude_names)]
    if isinstance(cfg.exclude_names, Default):
        excluded = [c for c in excluded if not any(spells(name, c.path) for name in names)]
    gone = {c.path for c in excluded}
    return [c for c in kept if c.path not in gone], excluded


def _roles(
    model: nn.Module, cfg: AdapterConfig, everything: Iterable[Candidate], kept: Iterable[Candidate]
) -> dict[str, str]:
    if cfg.d_model is not None:
        return {c.path: role(c, cfg.d_model) for c in kept}
    streams = Streams(model, {c.path: (c.i, c.o) for c in everything})
    if not streams.known:
        raise TargetError(
            f"{type(model).__name__}.config does not say d_model (looked for {', '.join(D_MODEL_FIELDS)}): give "
            f"{type(cfg).__name__}(d_model=...), or target_roles=() to select by name alone"
        )
    return {c.path: role(c, *streams[c.path]) for c in kept}


def _heads(model: nn.Module, cfg: AdapterConfig) -> set[Any]:
    """The output head and input embedding, whatever their names, while the config excludes them by the usual names."""
    getters = {"lm_head": "get_output_embeddings", "embed_tokens": "get_input_embeddings"}
    wanted = [getter for name, getter in getters.items() if name in cfg.exclude_names]
    found: set[Any] = set()
    for module in model.modules():  # a model may lie within another, such as one with a value head
        for get in (getattr(module, getter, None) for getter in wanted):
            with contextlib.suppress(NotImplementedError, AttributeError):  # transformers' ways to say that it has none
                found |= {get()} if callable(get) else set()
    return found


def _every_pattern_matches(everything: list[Candidate], cfg: AdapterConfig, model: nn.Module) -> None:
    paths = [c.path for c in everything]
    excludes = () if isinstance(cfg.exclude_names, Default) else cfg.exclude_names
    excludes = [name for name in excludes if name not in DEFAULT_EXCLUDE]  # they stand for heads of any name too
    modules = [path for path, _ in model.named_modules()]
    for where, patterns, among in (("target_names", cfg.target_names, paths), ("exclude_names", excludes, modules)):
        for pattern in patterns:
            if not any(matches(pattern, path) for path in among):
                raise TargetError(
                    f"{type(cfg).__name__}.{where}: {pattern!r} matches no linear layer; {near_misses(pattern, paths)}"
                )
    indices = {c.index for c in everything}
    if missing := [index for index in cfg.layers or () if index not in indices]:
        present = sorted(index for index in indices if index is not None)
        known = f"{present[0]} to {present[-1]}" if present else "none: no path has an integer"
        raise TargetError(f"{type(cfg).__name__}.layers: no layer {missing}; the indices are {known}")


def _nothing_left(everything: list[Candidate], excluded: list[Candidate], roles: dict[str, str], cfg: Any) -> str:
    name = type(cfg).__name__
    if roles:
        seen = ", ".join(f"{path}: {found}" for path, found in list(roles.items())[:5])
        return (
            f"{name}: no target has a role in {cfg.target_roles} ({seen}); add the role, give d_model=..., or use "
            "target_roles=() to select by name alone"
        )
    if excluded:
        paths = ", ".join(c.path for c in excluded[:5])
        return f"{name}: exclude_names = {cfg.exclude_names} leaves out every match ({paths}); shorten it to adapt them"
    return (
        f"{name}: target_names and layers leave nothing of {len(everything)} linear layers; see model.named_modules()"
    )


def uncovered(model: nn.Module) -> dict[str, int]:
    """Fused 3-D weights (experts), by name with their sizes: code multiplies with them without calling a layer, so no
    hook sees them. Convolution kernels and reparametrised tensors are none."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or "parametriz" in type(module).__module__:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                found[f"{path}.{name}" if path else name] = parameter.numel()
    return found
