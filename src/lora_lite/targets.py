"""Which layers a config adapts: filter by name, layer index and exclusion first, then classify by shape."""

import contextlib
import difflib
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_lite.config import DEFAULT_EXCLUDE, AdapterConfig
from lora_lite.errors import TargetError
from lora_lite.linear import is_linear, shape, unknown_kinds

# Which square layers (d_model -> d_model) write into the residual stream: the usual names of attention outputs and of
# second MLP layers. All other square layers read.
WRITER_NAMES = re.compile(
    r"(^|[._])(o|o_proj|out_proj|c_proj|out|wo|to_out|fc2|w2|down_proj|dense_4h_to_h|proj_out|linear2|out_lin|lin2)"
    r"(\.\d+)?$|(attention|attn|output|self)\.(dense|proj)$|mlp\.proj$"
)
D_MODEL_FIELDS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")


@dataclass(frozen=True)
class Candidate:
    """A linear layer of the model, by its path."""

    path: str
    layer: nn.Module
    i: int
    o: int

    @property
    def index(self) -> int | None:
        """The first integer in the path: the layer's index."""
        numbers = (part for part in self.path.split(".") if part.isdigit())
        return next((int(part) for part in numbers), None)


def candidates(model: nn.Module) -> list[Candidate]:
    """Every linear layer of the model, in the order of `named_modules`; adapters themselves hold none."""
    found = ((path, module) for path, module in model.named_modules() if path and is_linear(module))
    return [Candidate(path, module, *shape(module)) for path, module in found]


def d_model_of(model: nn.Module) -> int | None:
    """Width of the residual stream according to `model.config` (its text part, if it has several)."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    for source in (text() if callable(text) else None, config):
        for field in D_MODEL_FIELDS:
            if isinstance(value := getattr(source, field, None), int):
                return value
    return None


def role(candidate: Candidate, d_model: int) -> str:
    """ "reader" (d_model -> other), "writer" (other -> d_model) or "inner"; names decide for square layers only."""
    reads, writes = candidate.i == d_model, candidate.o == d_model
    if reads and writes:
        return "writer" if WRITER_NAMES.search(candidate.path) else "reader"
    return "reader" if reads else "writer" if writes else "inner"


def select(model: nn.Module, cfg: AdapterConfig) -> dict[str, nn.Module]:
    """The target layers of `cfg` in `model`, by path.

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


def _select(model: nn.Module, cfg: AdapterConfig) -> dict[str, nn.Module]:
    everything = candidates(model)
    if not everything:
        raise TargetError(f"{type(model).__name__} has no linear layer (in_features, out_features and a 2-D weight)")
    _every_pattern_matches(everything, cfg, model)
    kept = [c for c in everything if not cfg.target_names or any(re.search(p, c.path) for p in cfg.target_names)]
    if cfg.layers is not None:
        kept = [c for c in kept if c.index in cfg.layers]
    heads = _heads(model, cfg)
    excluded = [c for c in kept if c.layer in heads or any(re.search(p, c.path) for p in cfg.exclude_names)]
    kept = [c for c in kept if c not in excluded]
    roles: dict[str, str] = {}
    if cfg.target_roles:
        d_model = _require_d_model(model, cfg)
        roles = {c.path: role(c, d_model) for c in kept}
        kept = [c for c in kept if roles[c.path] in cfg.target_roles]
    if not kept:
        raise TargetError(_nothing_left(everything, excluded, roles, cfg))
    return {c.path: c.layer for c in kept}


def _require_d_model(model: nn.Module, cfg: AdapterConfig) -> int:
    if (d_model := cfg.d_model or d_model_of(model)) is None:
        raise TargetError(
            f"{type(model).__name__}.config does not tell d_model (looked for {', '.join(D_MODEL_FIELDS)}): give "
            f"{type(cfg).__name__}(d_model=...), or target_roles=() to select by name alone"
        )
    return d_model


def _heads(model: nn.Module, cfg: AdapterConfig) -> list[Any]:
    """The output head and input embedding, whatever their names, while the config excludes them by the usual names."""
    getters = {"lm_head": "get_output_embeddings", "embed_tokens": "get_input_embeddings"}
    wanted = [getter for name, getter in getters.items() if name in cfg.exclude_names]
    found = []
    for module in model.modules():  # a model may lie within another, such as one with a value head
        for get in (getattr(module, getter, None) for getter in wanted):
            with contextlib.suppress(NotImplementedError, AttributeError):  # transformers' ways to say that it has none
                found += [get()] if callable(get) else []
    return found


def _every_pattern_matches(everything: list[Candidate], cfg: AdapterConfig, model: nn.Module) -> None:
    paths = [c.path for c in everything]
    excludes = [pattern for pattern in cfg.exclude_names if pattern not in DEFAULT_EXCLUDE]
    modules = [path for path, _ in model.named_modules()]
    for field, patterns, where in (("target_names", cfg.target_names, paths), ("exclude_names", excludes, modules)):
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in where):
                raise TargetError(
                    f"{type(cfg).__name__}.{field}: {pattern!r} matches no linear layer; {near_misses(pattern, paths)}"
                )
    indices = {c.index for c in everything}
    if missing := [index for index in cfg.layers or () if index not in indices]:
        present = sorted(index for index in indices if index is not None)
        known = f"{present[0]} to {present[-1]}" if present else "none: no path has an integer"
        raise TargetError(f"{type(cfg).__name__}.layers: no layer {missing}; the indices are {known}")


def near_misses(pattern: str, paths: list[str], most: int = 5) -> str:
    """A sentence that names what comes closest to `pattern` among the last parts of `paths`, or what there is."""
    names = sorted({path.rsplit(".", 1)[-1] for path in paths} | set(paths))
    words = [word for word in re.findall(r"\w+", pattern) if word] or [pattern]
    close = [name for word in words for name in difflib.get_close_matches(word, names, n=most, cutoff=0.6)]
    if close:
        return f"near misses: {', '.join(dict.fromkeys(close))}"
    last = sorted({path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()}) or paths[:most]
    return f"the names here are {', '.join(last[:20])}"


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
