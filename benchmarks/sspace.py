"""How fast is S-space: bases against torch's SVD, peft and the published recipe; steps against the counted floor.

    python benchmarks/sspace.py [--device cuda] [--rounds 7] [--json results/benchmark-sspace.json] [--strict]

Every comparison is made side by side in one process; a line gives the median ratio of its rounds, their quartiles, and
the wanted bound. With --strict the exit code is 1 where a bound is missed.
"""

import argparse
import copy
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.calibration.collector import calibrate
from lora_lite.frozen_basis.basis import Basis
from lora_lite.lab.costs.macs import added_macs
from timing import Timing, machine, take_turns, write

R, I, O, TOKENS = 256, 3584, 1024, 1024  # tokens of a step, and of a calibration
PUBLISHED_CORDA = 120 / 2.5  # its orientation against its plain SVD, 24 layers, as published


class Report:
    """Prints and keeps comparisons."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def ratio(self, what: str, mine: Timing, other: Timing, at_most: float | None = None) -> None:
        """A line with mine / other, and whether it keeps to the bound."""
        middle, low, high = mine.over(other)
        self.add(what, middle, at_most, low=low, high=high, seconds=[mine.median, other.median])

    def add(self, what: str, value: float, at_most: float | None = None, **more: Any) -> None:
        ok = None if at_most is None else value <= at_most
        self.lines.append({"what": what, "value": value, "at_most": at_most, "ok": ok, **more})
        spread = f"[{more['low']:.3g}, {more['high']:.3g}]" if "low" in more else ""
        verdict = "" if ok is None else f"wanted <= {at_most:.3g}: {'PASS' if ok else 'FAIL'}"
        print(f"{what:<68} {value:>9.3g} {spread:<20} {verdict}", flush=True)


class Stack(nn.Module):
    """down_proj and up_proj of a 1024-wide model."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(I, O, bias=False), nn.Linear(O, I, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


@dataclass
class Case:
    """Two layers with decaying spectra, and inputs with a decaying one."""

    model: Stack
    x: Tensor

    @property
    def weights(self) -> list[Tensor]:
        return [self.model.down.weight.detach(), self.model.up.weight.detach()]


def case(device: str) -> Case:
    torch.manual_seed(0)
    model = Stack()
    for layer in (model.down, model.up):
        U, S, Vh = torch.linalg.svd(torch.randn(layer.out_features, layer.in_features), full_matrices=False)
        layer.weight.data.copy_(U * torch.linspace(0, -2, len(S)).exp() @ Vh)
    x = torch.randn(TOKENS, I) * torch.logspace(0, -1, I) + 0.1
    return Case(model.to(device).requires_grad_(False), x.to(device))


def published_corda(W: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The usual recipe: roots of C and their inverse, then the SVD of W C^1/2."""
    values, V = torch.linalg.eigh(C.double())
    root, inverse = (V * values.clamp(min=1e-12) ** p @ V.T for p in (0.5, -0.5))
    U, S, Vh = torch.linalg.svd(W.double() @ root, full_matrices=False)
    return U[:, :R], S[:R], (Vh @ inverse)[:R]


def bases(found: Case, report: Report, rounds: int, device: str) -> None:
    """Factorisation alone: statistics are given."""
    layers = {"down": found.model.down, "up": found.model.up}
    needs = {path: frozenset({"response", "input_moment"}) for path in layers}
    stats, _ = calibrate(found.model, layers, needs, [found.x])

    def ours(kind: str) -> list[tuple[Tensor, Tensor]]:
        for each in stats.values():
            each.input.eigen.clear()  # else every round but the first would find them
        return [Basis(kind).of(layer, stats[path], R) for path, layer in layers.items()]

    moments = {path: stats[path].mean("input_moment") for path in layers}
    eye = {path: 1e-3 * torch.eye(len(C), dtype=C.dtype, device=C.device) for path, C in moments.items()}

    def published() -> list[tuple[Tensor, ...]]:
        return [published_corda(layers[p].weight, moments[p] + eye[p]) for p in layers]

    contestants: dict[str, Callable[[], Any]] = {
        "plain": lambda: [torch.linalg.svd(W, full_matrices=False) for W in found.weights],
        "svd": lambda: ours("svd"),
        "corda": lambda: ours("corda"),
    }
    times = take_turns(contestants, rounds, device)
    report.ratio("basis: svd / torch.linalg.svd", times["svd"], times["plain"], 0.5)
    report.ratio("basis: corda / torch.linalg.svd", times["corda"], times["plain"], 2.0)
    slow = take_turns({"published": published, "plain": contestants["plain"]}, min(rounds, 2), device)
    report.ratio("basis: roots of C and their inverse / torch.linalg.svd", slow["published"], slow["plain"])
    mine = times["corda"].over(times["svd"])[0]
    report.add("basis: our corda / our svd (published: 48; wanted 20 times less)", mine, PUBLISHED_CORDA / 20)
    for kind, dense in (("svd", contestants["plain"]()), ("corda", published())):
        for (U, _), reference in zip(ours(kind), dense, strict=True):
            cosine = torch.linalg.svdvals(U.T @ reference[0][:, :R].to(U)).min()
            report.add(f"basis: 1 - smallest cosine of the {kind} subspaces", float(1 - cosine), 1e-4)


def peft_module() -> Any:
    """peft, whose CorDA asks the package attrs for what the standard library's dataclasses do as well."""
    if importlib.util.find_spec("attr") is None:
        import dataclasses

        sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclasses.dataclass)  # type: ignore[assignment]
    return importlib.import_module("peft")


def initialisation(found: Case, report: Report, rounds: int, device: str) -> None:
    """Whole initialisation, calibration included, of the two layers."""
    peft = peft_module()
    from peft.tuners.lora.corda import preprocess_corda

    def config(**changes: Any) -> Any:
        return peft.LoraConfig(r=R, lora_alpha=R, target_modules=["down", "up"], **changes)

    def theirs_corda() -> None:
        model, cfg = (
            copy.deepcopy(found.model),
            config(init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig()),
        )
        with torch.no_grad():
            preprocess_corda(model, cfg, run_model=lambda: model(found.x))
        peft.get_peft_model(model, cfg)

    def ours(cfg: Any, data: Any = None) -> None:
        ll.attach(copy.deepcopy(found.model), cfg, data)

    every: dict[str, Any] = {"r": R, "target_roles": ()}
    times = take_turns(
        {
            "peft pissa": lambda: peft.get_peft_model(copy.deepcopy(found.model), config(init_lora_weights="pissa")),
            "pissa": lambda: ours(ll.PiSSAConfig(alpha=float(R), **every)),
            "antipasto": lambda: ours(ll.AntiPaSTOConfig(**every)),
        },
        rounds,
        device,
    )
    report.ratio("attach: pissa / peft's PiSSA", times["pissa"], times["peft pissa"], 1 / 4)
    report.ratio("attach: antipasto / peft's PiSSA", times["antipasto"], times["peft pissa"])
    corda = ll.AntiPaSTOCorDAConfig(**every)
    one = ll.AntiPaSTOConfig(basis="corda:power=1.0", **every)
    times = take_turns(
        {"peft": theirs_corda, "half": lambda: ours(corda, [found.x]), "one": lambda: ours(one, [found.x])},
        min(rounds, 3),
        device,
    )
    report.ratio("attach: antipasto_corda / peft's CorDA", times["half"], times["peft"], 1 / 8)
    report.ratio("attach: antipasto, corda:power=1.0 / peft's CorDA", times["one"], times["peft"])


class Textbook(nn.Module):
    """S-space as written in books: W_res x + U (S (1 + elu g) * P x)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        U, S, P = torch.linalg.svd(layer.weight, full_matrices=False)
        self.U, self.S, self.P = U[:, :R].contiguous(), S[:R], P[:R].contiguous()
        self.W = layer.weight - self.U * self.S @ self.P
        self.g = nn.Parameter(torch.zeros_like(self.S))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T + (x @ self.P.T * (self.S * (1 + nn.functional.elu(self.g)))) @ self.U.T


def steps(found: Case, report: Report, rounds: int, device: str) -> None:
    """Forward and backward (to the input as well) of one layer, 3584 -> 1024."""
    x = found.x[:TOKENS].clone().requires_grad_()

    def step(layer: nn.Module) -> Callable[[], None]:
        weigh = torch.randn(TOKENS, O, device=x.device)

        def run() -> None:
            x.grad = None
            (layer(x) * weigh).sum().backward()

        return run

    def adapted(cfg: Any) -> nn.Module:
        holder = nn.Sequential(copy.deepcopy(found.model.down))
        ll.attach(holder, cfg)
        return holder

    every: dict[str, Any] = {"r": R, "target_roles": ()}
    layers = {
        "base": found.model.down,
        "antipasto": adapted(ll.AntiPaSTOConfig(**every)),
        "rot": adapted(ll.AntiPaSTORotConfig(**every)),
        "textbook": Textbook(found.model.down),
    }
    times = take_turns({name: step(layer) for name, layer in layers.items()}, 5 * rounds, device)
    base = I * O
    for side in ("output", "input"):
        macs = added_macs(ll.AntiPaSTOConfig(r=R, side=side), I, O).token
        report.add(f"MACs per token: (base + antipasto, {side} side) / base", (base + macs) / base)
    floor = (base + added_macs(ll.AntiPaSTOConfig(r=R), I, O).token) / base
    report.ratio("step: antipasto / base (1.05 of the counted floor)", times["antipasto"], times["base"], 1.05 * floor)
    report.ratio("step: textbook S-space / base", times["textbook"], times["base"])
    report.ratio("step: antipasto_rot / antipasto", times["rot"], times["antipasto"], 1.10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each comparison (steps: five times as many)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a bound is missed")
    args = parser.parse_args()
    about = machine(args.device)
    print(about)
    found, report = case(args.device), Report()
    for part in (bases, initialisation, steps):
        part(found, report, args.rounds, args.device)
    if args.json:
        write(args.json, {"command": f"python {' '.join(sys.argv)}", **about, "lines": report.lines})
    return int(args.strict and not all(line["ok"] is not False for line in report.lines))


if __name__ == "__main__":
    sys.exit(main())
