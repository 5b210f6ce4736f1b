"""What methods cost: what shapes give (parameters, bytes, multiply-accumulates), and what a clock and a meter show.

base = Base("smollm2", torch.float32, torch.device("cpu"))
rows = costs(base, {"lora": [ll.LoRAConfig()], "dora": [ll.DoRAConfig()]}, measure=False)
print(rows["lora"]["trainable"])
"""

import copy
import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import lora_lite as ll
from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.errors import CheckpointError, LoraLiteError, TargetError
from lora_lite.files.base_check import SKETCH_ROWS
from lora_lite.frozen_basis.rebuild import PROBES
from lora_lite.lab import terminal
from lora_lite.lab.costs.macs import added_macs, base_macs
from lora_lite.lab.costs.measure import Workload, measure_arm
from lora_lite.lab.costs.rows import BaseCost, CostRow, Misfit, Row, ShapeCost, Span
from lora_lite.lab.models.base import Base
from lora_lite.lab.models.load import model_config
from lora_lite.lab.numerals import size
from lora_lite.layers.linear import bias, shape
from lora_lite.layers.targets import select
from lora_lite.registry import method_of

Arms = Mapping[str, Sequence[AdapterConfig]]


def costs(base: Base, arms: Arms, measure: bool = True, workload: Workload | None = None) -> dict[str, Row]:
    """What each arm costs on a base, as plain data for JSON.

    An arm that does not fit the model gets a row with its "error" alone, and the others go on.

    Args:
        base: the model. Without `measure` only its configuration is read.
        arms: name -> configs (several for methods that share a file).
        measure: run the arms, one after the other. False: what shapes give, in seconds, for models of any size.
        workload: the batch and the number of rounds. None: the defaults of `Workload`.

    Raises:
        ModelError: the model, or its configuration, cannot be read.
    """
    rows = shape_costs(model_config(base.model, base.trust_remote_code), arms, base.trust_remote_code)
    for name, row in tqdm(rows.items(), desc="costs", unit="arm", disable=not measure):
        if measure and "error" not in row:
            try:
                rows[name] = {**row, **measure_arm(base, arms[name], workload)}
            except (LoraLiteError, ValueError) as error:
                rows[name] = _misfit(error)
    return rows


def measured_costs(base: Base, configs: Sequence[AdapterConfig], workload: Workload | None = None) -> CostRow:
    """The row of one arm, as `costs` gives it; an arm that does not fit the model raises what `attach` does."""
    meta = _on_meta(model_config(base.model, base.trust_remote_code), base.trust_remote_code)
    measured = measure_arm(base, configs, workload)
    return {**shape_cost(meta, configs), **base_cost(meta), **measured}


def shape_costs(
    model: PreTrainedModel | PreTrainedConfig, arms: Arms, trust_remote_code: bool = False
) -> dict[str, Row]:
    """What shapes alone give for each arm, without memory or weights: `shape_cost` and `base_cost`.

    model: a configuration, or a model, of which only the configuration is used. trust_remote_code: as for `load_model`.
    """
    meta = _on_meta(model if isinstance(model, PreTrainedConfig) else model.config, trust_remote_code)
    rows: dict[str, Row] = {}
    of_base = base_cost(meta)
    for name, configs in arms.items():
        try:
            rows[name] = {**shape_cost(meta, configs), **of_base}
        except (LoraLiteError, ValueError) as error:
            rows[name] = _misfit(error)
    return rows


def _misfit(error: Exception) -> Misfit:
    return {"error": f"{type(error).__name__}: {error}"}


def _on_meta(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a configuration, without memory. Eager attention, and experts as batched products: countable."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # shapes are those of the plain weights
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            attn_implementation="eager",
            experts_implementation="batched_mm",
            trust_remote_code=trust_remote_code,
        ).eval()


def shape_cost(model: PreTrainedModel, configs: Sequence[AdapterConfig]) -> ShapeCost:
    """What shapes give for one arm on a model on the meta device.

    stored_bytes: of the tensors in the file, with the sketches of the base; 128 bytes for each further parameter of the
    base, names and settings come on top. Multiply-accumulates: see `added_macs`, summed over the targets.

    A method that plans its layers from data is taken at its config instead: EVA with rho > 1 moves ranks between layers
    and keeps their mean, so its sums hold where the layers have equal shapes and are near elsewhere.

    Raises:
        TargetError: no target, targets that overlap, or a config that does not fit a layer.
    """
    planned, layers = _planned(model, configs), dict(model.named_modules())
    trainable = stored = bare = macs_token = macs_step = 0
    for path, cfg in planned.items():
        layer = layers[path]
        i, o = shape(layer)
        try:
            size = _size(cfg, i, o)
            macs = added_macs(cfg, i, o, bias(layer) is not None)
        except ValueError as error:
            raise TargetError(f"{path}: {error}") from error
        sketch = 4 * min(o, SKETCH_ROWS)
        trainable += size.trained
        stored += size.stored + sketch
        bare += size.bare + sketch
        macs_token += macs.token
        macs_step += macs.step
    return {
        "trainable": trainable,
        "targets": len(planned),
        "stored_bytes": stored,
        "stored_bytes_without_basis": bare if any(map(_rebuildable, set(planned.values()))) else None,
        "macs_token": macs_token,
        "macs_step": macs_step,
    }


def base_cost(model: PreTrainedModel) -> BaseCost:
    """What shapes give for the base: see `base_macs`."""
    return {"base_macs_token": base_macs(model), "base_parameters": sum(p.numel() for p in model.parameters())}


def _planned(model: nn.Module, configs: Sequence[AdapterConfig]) -> dict[str, AdapterConfig]:
    """The config of each target."""
    planned: dict[str, AdapterConfig] = {}
    for cfg in configs:
        shapes = {path: shape(layer) for path, layer in select(model, cfg).items()}
        if both := sorted(set(shapes) & set(planned)):
            raise TargetError(f"{both[0]} is selected by two configs of the arm; make them disjoint")
        cls = method_of(cfg)
        planned |= dict.fromkeys(shapes, cfg) if cls.needs(cfg) else cls.plan(cfg, shapes, {})
    return planned


class Size(NamedTuple):
    """Trained values of an adapter, and the bytes of its tensors in a file with and without its basis."""

    trained: int
    stored: int
    bare: int


@functools.cache
def _size(cfg: AdapterConfig, i: int, o: int) -> Size:
    with torch.device("meta"):
        adapter: Adapter = method_of(cfg)(cfg, i, o)  # type: ignore[call-arg]
    state = adapter.state_dict()
    saved = sum(state[key].nbytes - 4 * (1 + PROBES) * state[key].shape[1] for key in adapter.rebuildable)
    stored = sum(tensor.nbytes for tensor in state.values())
    return Size(sum(p.numel() for p in adapter.parameters()), stored, stored - saved)


def _rebuildable(cfg: AdapterConfig) -> bool:
    """Whether `save(..., basis=False)` takes the config's basis: asked of it, on a small layer."""
    basis = getattr(cfg, "basis", None)
    return basis is not None and bool(method_of(cfg).rebuildable) and _follows_from_weights(basis)


@functools.cache
def _follows_from_weights(basis: ll.Basis) -> bool:
    i, o = 12, 8
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.utils.skip_init(nn.Linear, i, o, bias=False))
    nn.init.normal_(model[0].weight, generator=rng)  # type: ignore[arg-type]
    cfg = ll.AntiPaSTOConfig(r=4, basis=basis, target_roles=())
    ll.attach(model, cfg, [torch.randn(64, i, generator=rng) * torch.arange(1, i + 1)] if basis.needs else None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            ll.save(model, Path(folder) / "probe.safetensors", basis=False)
        except CheckpointError:
            return False
    return True


# ---- for people


def cost_table(rows: Mapping[str, Row]) -> Table:
    """The rows as a table. Columns that no arm has a value for are left out; times are ratios to the frozen base's."""
    columns: dict[str, Any] = {
        "trained": lambda row: f"{row['trainable']:,}",
        "file": lambda row: size(row["stored_bytes"]),
        "without basis": lambda row: _maybe(row.get("stored_bytes_without_basis"), size),
        "MACs/token": lambda row: _macs(row["macs_token"], row.get("base_macs_token")),
        "MACs/pass": lambda row: f"{row['macs_step']:,}" if row["macs_step"] else "",
        "forward": lambda row: _maybe(row.get("forward"), _ratio),
        "step": lambda row: _maybe(row.get("step"), _ratio),
        "tokens/s": lambda row: _maybe(row.get("tokens_per_second"), lambda v: f"{v:,.0f}"),
        "memory, MB": lambda row: _maybe(row.get("peak_memory_mb"), lambda v: f"{v:,.0f}"),
        "base's": lambda row: _maybe(row.get("base_peak_memory_mb"), lambda v: f"{v:,.0f}"),
        "attach, s": lambda row: _maybe(row.get("attach_seconds"), _phases),
        "load, s": lambda row: _maybe(row.get("load_seconds"), lambda v: f"{v:.2f}"),
    }
    cells = {
        name: {"": f"does not fit: {row['error']}"} if "error" in row else {k: f(row) for k, f in columns.items()}
        for name, row in rows.items()
    }
    kept = [title for title in columns if any(line.get(title) for line in cells.values())]
    table = terminal.table("costs", "\n".join(_captions(cells)))
    terminal.column(table, "method")
    for title in kept:
        terminal.column(table, title, right=True)
    for name, line in cells.items():
        terminal.row(table, [name, *([line[title] for title in kept] if "" not in line else [])])
    return table


def _captions(cells: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    yield "MACs: multiply-accumulates added to the base's (and as a share of them)"
    if any(line.get("forward") for line in cells.values()):
        yield "forward, step: time over the frozen base's, median [quartiles]"
        yield "attach: calibration + factorisation + build"
    yield from (f"{name}: {line['']}" for name, line in cells.items() if "" in line)


def _maybe(value: Any, show: Any) -> str:
    return show(value) if value else ""


def _macs(added: int, base: int | None) -> str:
    return f"{added:,} ({added / base:.2%})" if base else f"{added:,}"


def _ratio(span: Span) -> str:
    return f"{span['mean']:.2f} [{span['low']:.2f}, {span['high']:.2f}]"


def _phases(seconds: Mapping[str, float]) -> str:
    return " + ".join(f"{seconds.get(phase, 0.0):.1f}" for phase in ("calibration", "factorisation", "build"))
