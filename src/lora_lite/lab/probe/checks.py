"""The checks of a probe, on one model. Each measures one promise of the library; `probe.py` makes a table of them."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import lora_lite as ll
from lora_lite.batches import eval_mode
from lora_lite.checking.check import EXPERT
from lora_lite.lab.provenance import tensor_print
from lora_lite.layers.linear import is_linear, is_quantized
from lora_lite.layers.targets import select
from lora_lite.merging.plain_weights import affine
from lora_lite.registry import method_of

Batch = Mapping[str, Tensor]
Configs = Sequence[ll.AdapterConfig]
Found = tuple[str, bool | None]

PERTURBATION = 1e-2
# Largest relative difference of the merged weight's output: rounding of the base's dtype, and of quantised activations.
MERGE_BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-4}
MERGE_16_BITS, MERGE_QUANTIZED = 0.03, 0.1


class Probe:
    """The checks, in their order; each returns what it measured and whether that is within its bound."""

    def __init__(
        self,
        fresh: Callable[[], PreTrainedModel],
        configs: Configs,
        batches: Sequence[Batch],
        data: Any,
        lr: float | None,
        steps: int,
        also: Sequence[str],
    ) -> None:
        self.fresh, self.configs, self.data, self.steps, self.also = fresh, configs, data, steps, also
        self.model = fresh()
        device = self.model.device
        self.batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        self.base = self.logits(self.model)  # before the fingerprints: some layers settle their dtype when first run
        self.prints = fingerprints(self.model)
        self.lr = lr if lr is not None else method_of(configs[0]).facts.lr
        self.trained = all(method_of(cfg).facts.trained for cfg in configs)
        self.runs = False
        self.touched: list[str] = []
        self.identity_bound = max(method_of(cfg).identity_bound(cfg, self.model.dtype) for cfg in configs)
        quantized = any(is_quantized(layer) for layer in self.model.modules() if is_linear(layer))
        self.merge_bound = MERGE_QUANTIZED if quantized else MERGE_BOUNDS.get(self.model.dtype, MERGE_16_BITS)

    def checks(self) -> list[tuple[str, str, Callable[[], Found]]]:
        """Name, bound and function of each check."""
        allowed = f"<= {self.identity_bound:.0e} a layer" if self.identity_bound else "the base's bits"
        return [
            ("targets", "each selected layer runs its adapter", self.targets),
            ("identity at attach", allowed, self.identity),
            ("effect of a perturbation", "> 0, finite", self.effect),
            ("gradients, perturbed", "each tensor's norm > 0, finite", self.gradients),
            ("ll.check", "passes", self.check),
            (f"movement in {self.steps} steps", "each tensor moves, finite", self.movement),
            ("gradients on the base", "none", self.base_gradients),
            ("base after training", "the same bits", self.bits),
            ("c = 0 after training", "the base's bits", self.zero),
            ("reloaded on a fresh base", "0", self.reload),
            ("merged, a layer of each kind", f"<= {self.merge_bound:.0e}", self.merge),
        ]

    # ---- helpers

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        batch = {key: value for key, value in self.batches[0].items() if key != "labels"}
        with eval_mode(model):
            return model(**batch, use_cache=False).logits

    def backward(self, batch: Batch) -> float:
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        self.model.eval()
        return float(loss.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Every trained tensor, by name."""
        found = {
            f"{path}.{key}": p for path, adapter in self.att.targets.items() for key, p in adapter.named_parameters()
        }
        return {**found, **self.att.also}

    # ---- checks

    def targets(self) -> Found:
        wanted = {path for cfg in self.configs for path in select(self.model, cfg)}
        self.att = ll.attach(self.model, self.configs, self.data, train_also=self.also)
        ran: set[str] = set()
        handles = [
            adapter.register_forward_hook(lambda *_, path=path: ran.add(path))
            for path, adapter in self.att.targets.items()
        ]
        try:
            self.adapted = self.logits(self.model)
        finally:
            for handle in handles:
                handle.remove()
        self.runs = True
        idle = sorted(path for path in set(self.att.targets) - ran if not EXPERT.search(path))
        if idle:
            return f"{len(idle)} of {len(self.att.targets)} adapters never ran, such as {idle[0]}", False
        return f"{len(wanted)} selected: {by_pattern(self.att.targets)}", set(self.att.targets) <= wanted

    def identity(self) -> Found:
        with ll.scale(self.model, 1.0 if self.trained else 0.0):
            error = distance(self.logits(self.model), self.base)
        if self.identity_bound == 0:
            return f"{error:.1e}", error == 0
        return f"{error:.1e}", error <= self.identity_bound * len(self.att.targets)

    def effect(self) -> Found:
        before = {key: tensor.detach().clone() for key, tensor in self.tensors().items()}
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in self.tensors().values():
                noise = torch.randn(tensor.shape, generator=rng).to(tensor)
                tensor.add_(noise * PERTURBATION * tensor.abs().mean().clamp(min=1.0))
        try:
            change = distance(self.logits(self.model), self.adapted)
            self.backward(self.batches[0])
            self.norms = {key: norm_of(tensor) for key, tensor in self.tensors().items()}
        finally:
            with torch.no_grad():
                for key, tensor in self.tensors().items():
                    tensor.copy_(before[key])
            self.model.zero_grad(set_to_none=True)
        return f"{change:.1e} of the logits", 0 < change < float("inf")

    def gradients(self) -> Found:
        if not hasattr(self, "norms"):
            return "not reached", None
        return spread({key: norm for key, norm in self.norms.items() if norm > 0 or not EXPERT.search(key)})

    def check(self) -> Found:
        report = ll.check(self.model, self.batches[:1])
        return f"{sum(map(len, report.layers.values()))} adapters; rows independent: {report.rows_independent}", True

    def movement(self) -> Found:
        tensors = self.tensors()
        before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        own = {id(tensor) for tensor in tensors.values()}
        optimizer = torch.optim.AdamW(ll.param_groups(self.model, self.lr))
        for step in range(self.steps):
            loss = self.backward(self.batches[step % len(self.batches)])
            self.touched += [key for key, p in self.model.named_parameters() if p.grad is not None and id(p) not in own]
            if not loss < float("inf"):
                return f"the loss of step {step + 1} is {loss}", False
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        moved = {key: float((tensor.detach() - before[key]).abs().max()) for key, tensor in tensors.items()}
        return spread({key: size for key, size in moved.items() if size > 0 or not EXPERT.search(key)})

    def base_gradients(self) -> Found:
        names = list(dict.fromkeys(self.touched))
        return (f"{len(names)}, such as {names[0]}" if names else "none"), not names

    def bits(self) -> Found:
        now = fingerprints(self.model)
        changed = [key for key, digest in self.prints.items() if now.get(key) != digest and key not in self.att.also]
        return (f"{len(changed)} changed, such as {changed[0]}" if changed else f"{len(now)} tensors"), not changed

    def zero(self) -> Found:
        if self.att.also:
            return "train_also changes the base by request", None
        with ll.scale(self.model, 0.0):
            error = distance(self.logits(self.model), self.base)
        return f"{error:.1e}", error == 0

    def reload(self) -> Found:
        trained = self.logits(self.model)
        other = self.fresh()
        with tempfile.TemporaryDirectory() as folder:
            file = ll.save(self.model, Path(folder) / "adapter.safetensors")
            ll.load(other, file)
            size = file.stat().st_size
        error = distance(self.logits(other), trained)
        return f"{error:.1e}; a file of {size / 1e6:,.3g} MB", error == 0

    def merge(self) -> Found:
        if not all(method_of(cfg).facts.affine for cfg in self.configs):
            return "not affine: does not merge", None
        kinds = {pattern(path): path for path in reversed(self.att.targets)}
        errors = {path: merge_error(self.model, path) for path in kinds.values()}
        worst = max(errors, key=lambda path: errors[path])
        return f"{errors[worst]:.1e} at {worst}", errors[worst] <= self.merge_bound


def fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """Fingerprints of the bits of every tensor of the base, by name."""
    return {key: tensor_print(tensor) for key, tensor in ll.base_state_dict(model).items()}


@torch.no_grad()
def merge_error(model: PreTrainedModel, path: str) -> float:
    """||merged(x) - adapted(x)|| / ||adapted(x)|| of a layer on random inputs, in the model's dtype. Writes nothing."""
    layer = model.get_submodule(path)
    W, b = affine(layer, path)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, W.shape[1], generator=rng).to(model.device, model.dtype)
    with ll.scale(model, 1.0):
        adapted = layer(x).double()
    merged = F.linear(x, W.to(x), b.to(x)).double()
    return float((merged - adapted).norm() / adapted.norm())


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; 0 where they are equal, infinite where not finite."""
    if torch.equal(found, expected):
        return 0.0
    change = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return change if change < float("inf") else float("inf")


def norm_of(tensor: Tensor) -> float:
    """Norm of a tensor's gradient; NaN without one."""
    return float("nan") if tensor.grad is None else float(tensor.grad.norm())


def spread(sizes: Mapping[str, float]) -> Found:
    """Smallest and largest size, or the names of those that are zero or not finite; and whether there are none."""
    bad = {key: size for key, size in sizes.items() if not 0 < size < float("inf")}
    if bad:
        name, size = next(iter(bad.items()))
        return f"{len(bad)} of {len(sizes)} tensors, such as {name}: {size}", False
    if not sizes:
        return "no trained tensor", None
    return f"{min(sizes.values()):.1e} to {max(sizes.values()):.1e}, {len(sizes)} tensors", True


def pattern(path: str) -> str:
    """A path with its numbers left out."""
    return re.sub(r"\d+", "*", path)


def by_pattern(paths: Mapping[str, Any]) -> str:
    """How many paths of each pattern, by their last parts."""
    counts = Counter(pattern(path).rsplit(".", 1)[-1] for path in paths)
    return ", ".join(f"{name} {count}" for name, count in counts.items())
