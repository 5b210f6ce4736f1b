"""What methods cost: what shapes give (parameters, bytes, multiply-accumulates), and what a clock and a meter show.

rows = costs("smollm2", {"lora": [ll.LoRAConfig()], "dora": [ll.DoRAConfig()]}, torch.float32, measure=False)
print(rows["lora"]["trainable"])
"""

import copy
import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from lora_lite.lab.models.load import model_config
from lora_lite.lab.numerals import size
from lora_lite.layers.linear import bias, shape
from lora_lite.layers.targets import select
from lora_lite.registry import method_of

Arms = Mapping[str, Sequence[AdapterConfig]]
Row = dict[str, Any]


def costs(
    model: str,
    arms: Arms,
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
    measure: bool = True,
    workload: Workload | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Row]:
    """What each arm costs on a model: the fields of `findings.Cost`, as plain data for JSON, and what they hold for.

    An arm that does not fit the model gets a row with its "error" alone, and the others go on.

    Args:
        model: "smollm2", a hub id or a local folder. Without `measure` only its configuration is read.
        arms: name -> configs (several for methods that share a file).
        dtype, quantization: of the base, as for `load_model`.
        measure: run the arms, one after the other. False: what shapes give, in seconds, for models of any size.
        workload: the batch and the number of rounds. None: the defaults of `Workload`.
        device: where to measure. None: the GPU if there is one.
        trust_remote_code: as for `load_model`.

    Raises:
        ModelError: the model, or its configuration, cannot be read.
    """
    rows = shape_costs(model_config(model, trust_remote_code), arms, trust_remote_code)
    fitting = [name for name, row in rows.items() if "error" not in row] if measure else []
    for name in tqdm(fitting, desc="costs", unit="arm", disable=not measure):
        try:
            rows[name] |= measure_arm(model, arms[name], dtype, quantization, workload, device, trust_remote_code)
        except (LoraLiteError, ValueError) as error:
            rows[name] = _failure(error)
    return rows


def measured_costs(
    model: str,
    configs: Sequence[AdapterConfig],
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
    workload: Workload | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Row:
    """The row of one arm, as `costs` gives it; an arm that does not fit the model raises what `attach` does."""
    meta = _on_meta(model_config(model, trust_remote_code), trust_remote_code)
    measured = measure_arm(model, configs, dtype, quantization, workload, device, trust_remote_code)
    return shape_cost(meta, configs) | base_cost(meta) | measured


def shape_costs(
    model: PreTrainedModel | PreTrainedConfig, arms: Arms, trust_remote_code: bool = False
) -> dict[str, Row]:
    """What shapes alone give for each arm, without memory or weights: `shape_cost` and `base_cost`.

    model: a configuration, or a model, of which only the configuration is used. trust_remote_code: as for `load_model`.
    """
    meta = _on_meta(model if isinstance(model, PreTrainedConfig) else model.config, trust_remote_code)
    rows: dict[str, Row] = {}
    base = base_cost(meta)
    for name, configs in arms.items():
        try:
            rows[name] = shape_cost(meta, configs) | base
        except (LoraLiteError, ValueError) as error:
            rows[name] = _failure(error)
    return rows


def _failure(error: Exception) -> Row:
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


def shape_cost(model: PreTrainedModel, configs: Sequence[AdapterConfig]) -> Row:
    """What shapes give for one arm on a model on the meta device.

    Returns: trainable; targets (number of adapted layers); stored_bytes (of the tensors in the file, with the sketches
    of the base; 128 bytes for each further parameter of the base, names and settings come on top);
    stored_bytes_without_basis (the same for `save(..., basis=False)`; None where that is refused, or there is no
    basis); macs_token, macs_step (see `added_macs`, summed over the targets).

    A method that plans its layers from data is taken at its config instead: EVA with rho > 1 moves ranks between layers
    and keeps their mean, so its sums hold where the layers have equal shapes and are near elsewhere.

    Raises:
        TargetError: no target, targets that overlap, or a config that does not fit a layer.
    """
    planned, layers = _planned(model, configs), dict(model.named_modules())
    row: Row = dict.fromkeys(("trainable", "stored_bytes", "stored_bytes_without_basis", "macs_token", "macs_step"), 0)
    for path, cfg in planned.items():
        layer = layers[path]
        i, o = shape(layer)
        try:
            trained, stored, bare = _size(cfg, i, o)
            macs = added_macs(cfg, i, o, bias(layer) is not None)
        except ValueError as error:
            raise TargetError(f"{path}: {error}") from error
        sketch = 4 * min(o, SKETCH_ROWS)
        row["trainable"] += trained
        row["stored_bytes"] += stored + sketch
        row["stored_bytes_without_basis"] += bare + sketch
        row["macs_token"] += macs.token
        row["macs_step"] += macs.step
    if not any(map(_rebuildable, set(planned.values()))):
        row["stored_bytes_without_basis"] = None
    return {**row, "targets": len(planned)}


def base_cost(model: PreTrainedModel) -> Row:
    """What shapes give for the base: base_macs_token (see `base_macs`) and base_parameters."""
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


@functools.cache
def _size(cfg: AdapterConfig, i: int, o: int) -> tuple[int, int, int]:
    """Trained values of an adapter, and the bytes of its tensors in a file with and without its basis."""
    with torch.device("meta"):
        adapter: Adapter = method_of(cfg)(cfg, i, o)  # type: ignore[call-arg]
    state = adapter.state_dict()
    saved = sum(state[key].nbytes - 4 * (1 + PROBES) * state[key].shape[1] for key in adapter.rebuildable)
    stored = sum(tensor.nbytes for tensor in state.values())
    return sum(p.numel() for p in adapter.parameters()), stored, stored - saved


def _rebuildable(cfg: AdapterConfig) -> bool:
    """Whether `save(..., basis=False)` takes the config's basis: asked of it, on a small layer."""
    basis = getattr(cfg, "basis", None)
    return basis is not None and bool(method_of(cfg).rebuildable) and _told_by_weights(basis)


@functools.cache
def _told_by_weights(basis: ll.Basis) -> bool:
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
    kept = [title for title in columns if any(found.get(title) for found in cells.values())]
    table = terminal.table("costs", "\n".join(_captions(cells)))
    terminal.column(table, "method")
    for title in kept:
        terminal.column(table, title, right=True)
    for name, found in cells.items():
        terminal.row(table, [name, *([found[title] for title in kept] if "" not in found else [])])
    return table


def _captions(cells: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    yield "MACs: multiply-accumulates added to the base's (and as a share of them)"
    if any(found.get("forward") for found in cells.values()):
        yield "forward, step: time over the frozen base's, median [quartiles]"
        yield "attach: calibration + factorisation + build"
    yield from (f"{name}: {found['']}" for name, found in cells.items() if "" in found)


def _maybe(value: Any, show: Any) -> str:
    return show(value) if value else ""


def _macs(added: int, base: int | None) -> str:
    return f"{added:,} ({added / base:.2%})" if base else f"{added:,}"


def _ratio(span: Mapping[str, float]) -> str:
    return f"{span['mean']:.2f} [{span['low']:.2f}, {span['high']:.2f}]"


def _phases(seconds: Mapping[str, float]) -> str:
    return " + ".join(f"{seconds.get(phase, 0.0):.1f}" for phase in ("calibration", "factorisation", "build"))
