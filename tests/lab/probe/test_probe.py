"""The probe passes every trained method on a real (tiny) model, and finds each way in which a method can be broken."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import lora_lite as ll
from lab_helpers import make_llama, save_tiny
from lora_lite.lab.probe.checks import distance, spread
from lora_lite.lab.probe.probe import ProbeReport, probe, probe_method
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.data import collate
from lora_lite.lab.training.progress import TrainConfig
from training_runs import make_items

TRAINED = [name for name, cls in ll.methods().items() if cls.facts.trained]
BATCHES = [collate(make_items()[at : at + 4], 0) for at in (0, 4)]
DATA = [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} for batch in BATCHES]


def run(cfg: Any, fresh: Callable[[], Any] = make_llama, **changes: Any) -> ProbeReport:
    needs = ll.registry.method_of(cfg).needs(cfg)
    return probe_method(fresh, cfg, BATCHES, DATA if needs else None, lr=1e-2, **changes)


def failed(report: ProbeReport) -> set[str]:
    return {check.name for check in report.checks if check.ok is False}


def text(report: ProbeReport) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_passes_every_check(method: str) -> None:
    report = run(ll.methods()[method].tiny())
    assert report.ok and failed(report) == set(), text(report)
    assert all(check.ok for check in report.checks), text(report)  # none was left out


@pytest.mark.parametrize("method", ["lora", "dora", "hra", "antipasto_rot"])
def test_methods_pass_in_sixteen_bits(method: str) -> None:
    report = run(ll.methods()[method].tiny(), lambda: make_llama().to(torch.bfloat16))
    assert all(check.ok for check in report.checks), text(report)


def test_several_configs_and_trained_base_weights_pass() -> None:
    report = run([ll.IA3Config(), ll.IA3FFConfig()][0])
    assert report.ok
    both = probe_method(make_llama, [ll.IA3Config(), ll.IA3FFConfig()], BATCHES, lr=1e-2, train_also=("norm",))
    assert both.ok, text(both)
    assert next(check for check in both.checks if check.name.startswith("c = 0")).ok is None  # it cannot apply


# ---- broken methods


@dataclasses.dataclass(frozen=True)
class BrokenConfig(ll.AdapterConfig):
    """Of the broken methods."""


class Sound(ll.Adapter):
    """A small LoRA, which the broken methods change in one place."""

    def __init__(self, cfg: Any, i: int, o: int) -> None:
        super().__init__(cfg)
        self.A = self.parameter(cfg.r, i)
        self.B = self.parameter(o, cfg.r)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        self.A.normal_(generator=rng)

    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return c.to(x.dtype) * (x @ self.A.T @ self.B.T)


class NoEffect(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return 0 * super().change(x, y, layer, c)


class WritesTheBase(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        if self.training:
            layer.weight.data.view(-1)[0] += 1e-3  # type: ignore[union-attr, operator]
        return super().change(x, y, layer, c)


class TrainsTheBase(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        if self.training:
            layer.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
            return super().change(x, y, layer, c) + 0 * nn.functional.linear(x, layer.weight)  # type: ignore[arg-type]
        return super().change(x, y, layer, c)


class GradientNotFinite(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return super().change(x, y, layer, c) + (0 * self.B[:, 0]).abs().sqrt()  # 0, with slope 0 / 0


class NotIdentical(Sound):
    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        super().init(layer, stats, rng)
        self.B.fill_(1e-4)


class CoefficientIgnored(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return super().change(x, y, layer, torch.ones(()))


class LosesState(Sound):
    """What it reads of A's scale is neither a parameter nor a buffer, so that no file holds it."""

    scale = 1.0

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        super().init(layer, stats, rng)
        self.scale = 1.5

    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return self.scale * super().change(x, y, layer, c)


class OnlyOneOfTwo(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return c.to(x.dtype) * (x @ self.A.detach().T @ self.B.T)


class SaysItMerges(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return super().change(x.tanh(), y, layer, c)


class WrongShape(Sound):
    def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return super().change(x, y, layer, c)[..., :-1]


AFTER = {"c = 0 after training", "reloaded on a fresh base"}
MERGED, MOVED, GRADIENTS = "merged, a layer of each kind", "movement in 3 steps", "gradients, perturbed"
BROKEN: list[tuple[type[Sound], str, set[str]]] = [
    (Sound, "", set()),
    (NoEffect, "effect of a perturbation", {GRADIENTS, "ll.check", MOVED}),
    (WritesTheBase, "base after training", AFTER),
    (TrainsTheBase, "gradients on the base", {"reloaded on a fresh base"}),
    (GradientNotFinite, GRADIENTS, {"ll.check", MOVED, MERGED, *AFTER}),
    (NotIdentical, "identity at attach", set()),
    (CoefficientIgnored, "c = 0 after training", {"ll.check"}),
    (LosesState, "reloaded on a fresh base", set()),
    (OnlyOneOfTwo, GRADIENTS, {"ll.check", MOVED}),
    (SaysItMerges, MERGED, set()),
    (WrongShape, "targets", set()),
]


@pytest.mark.parametrize(("cls", "row", "others"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_method_fails_in_the_right_row(cls: type[Sound], row: str, others: set[str]) -> None:
    ll.register(BrokenConfig, ll.Facts("broken", title="Broken on purpose", arxiv="0000.00000", lr=1e-2))(cls)
    report = run(BrokenConfig(r=2))
    assert failed(report) - others == ({row} if row else set()), text(report)
    assert report.ok == (row == "")


# ---- what does not fit, and what is printed


def test_a_misfit_is_a_row_and_the_rest_is_not_reached() -> None:
    report = run(ll.PiSSAConfig(r=100))
    assert failed(report) == {"targets"} and not report.ok
    assert "TargetError: model.layers.0.self_attn.q_proj: r = 100 is larger" in report.checks[0].measured
    assert all(check.measured == "not reached" and check.ok is None for check in report.checks[1:])


def test_a_layer_that_never_runs_is_found() -> None:
    def fresh() -> Any:
        model = make_llama()
        model.unused = nn.Linear(32, 8)
        return model

    report = run(ll.LoRAConfig(r=2), fresh)
    assert {"targets", GRADIENTS, "ll.check", MOVED} <= failed(report)
    assert "1 of 15 adapters never ran, such as unused" in report.checks[0].measured


def test_what_is_printed_and_what_json_holds() -> None:
    report = run(ll.LoRAConfig(r=2))
    shown = text(report)
    assert "14 selected: q_proj 2, k_proj 2" in shown and "the base's bits" in shown and "FAILED" not in shown
    assert json.loads(json.dumps(report.summary()))["checks"]["ll.check"]["ok"] is True
    assert "FAILED" in text(run(ll.PiSSAConfig(r=100)))


def test_sizes_that_are_zero_or_not_finite_are_named() -> None:
    assert spread({"a": 1.0, "b": 0.0}) == ("1 of 2 tensors, such as b: 0.0", False)
    assert spread({"a": float("nan")})[1] is False and spread({"a": 1.0, "b": 2.0})[1] is True
    assert distance(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5


def test_by_name_with_the_examples_of_a_task(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = RunConfig(model=str(tmp_path), task="gcd", dtype="float32", device="cpu", max_length=400)
    report = probe(config, ll.EVAConfig(r=2), TrainConfig())
    assert report.ok and all(check.ok for check in report.checks), text(report)
    with pytest.raises(ll.LoraLiteError, match="nowhere"):
        probe(dataclasses.replace(config, model=str(tmp_path / "nowhere")), ll.LoRAConfig(), TrainConfig())


@pytest.mark.slow
def test_the_embedded_model_passes() -> None:
    report = probe(RunConfig(dtype="float32", device="cpu"), ll.LoRAConfig(), TrainConfig())
    assert all(check.ok for check in report.checks), text(report)
