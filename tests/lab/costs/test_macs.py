"""Published sizes of adapters on Qwen3.5-0.8B's down_proj (3584 -> 1024, 24 layers), from shapes alone; and every
method's products against the formula that its equations ask for."""

import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import lora_lite as ll
from lora_lite.lab.costs.macs import TEXT, Macs, added_macs, base_macs

I, O, LAYERS = 3584, 1024, 24

PARAMETERS: list[tuple[str, dict[str, Any], int]] = [
    ("lora", {"r": 32}, 3_538_944),
    ("dora", {"r": 32}, 3_563_520),
    ("antipasto", {"r": 256}, 6_144),
    ("antipasto_rot", {"r": 256, "block_size": 4}, 15_360),
    ("antipasto_ablate", {"r": 256}, 6_168),
    ("antipasto_dplr", {"r": 256, "lora_rank": 8}, 104_448),
]


def trained(method: str, **changes: Any) -> int:
    cls: Any = ll.methods()[method]
    with torch.device("meta"):
        return sum(p.numel() for p in cls(cls.Config(**changes), I, O).parameters())


@pytest.mark.parametrize(("method", "changes", "published"), PARAMETERS)
def test_trained_parameters(method: str, changes: dict[str, Any], published: int) -> None:
    assert LAYERS * trained(method, **changes) == published


def test_the_smallest_arrow() -> None:
    assert trained("antipasto_arrow", r=8, block=3) == 14


def test_a_lora_adds_as_many_products_as_it_has_parameters() -> None:
    assert LAYERS * added_macs(ll.LoRAConfig(r=32), I, O).token == 3_538_944


def test_s_space_reads_the_side_that_costs_less(capsys: pytest.CaptureFixture[str]) -> None:
    textbook = LAYERS * added_macs(ll.AntiPaSTOConfig(side="input"), I, O).token
    ours = LAYERS * added_macs(ll.AntiPaSTOConfig(), I, O).token
    assert textbook == LAYERS * 256 * (I + O) == 28_311_552  # P x, then U
    assert ours == LAYERS * 2 * 256 * O  # U^T y, then U
    with capsys.disabled():
        print(f"\nS-space on down_proj, MACs per token: textbook {textbook:,}, here {ours:,} ({ours / textbook:.2f})")
    assert added_macs(ll.AntiPaSTOConfig(), O, I).token == 256 * (I + O)  # as for up_proj: the input is smaller


def test_what_is_built_once_a_step_is_counted_apart() -> None:
    plain = added_macs(ll.AntiPaSTOConfig(), I, O)
    both = added_macs(ll.AntiPaSTORotConfig(rotate_basis="both"), I, O)
    assert plain.step == 0 and both.step > 0 and both.token == plain.token
    dora = added_macs(ll.DoRAConfig(r=32), I, O)
    assert dora.token == 32 * (I + O) and dora.step > 0


# ---- the formulas, from the papers' equations and the order of the products that the methods' docstrings give


def low_rank(cfg: Any, i: int, o: int) -> Macs:
    return Macs(cfg.r * i + o * cfg.r, 0)  # h = A x, then B h


def two_factors(cfg: Any, i: int, o: int) -> Macs:
    return Macs(2 * cfg.r * i + 2 * cfg.r * o, 0)  # the trained factors and where they started


def dora(cfg: Any, i: int, o: int) -> Macs:
    r = cfg.r
    norm = o * i * r + r * i * r + o * r * r  # W A^T, A A^T, and B (A A^T)
    return Macs(low_rank(cfg, i, o).token, norm)


def hra(cfg: Any, i: int, o: int) -> Macs:
    r = cfg.r
    return Macs(r * i + r * r + i * r, r * i * r)  # u x, T, u^T; once: u u^T


def elementwise(cfg: Any, i: int, o: int) -> Macs:
    return Macs(0, 0)


def core(products: Callable[[Any, int], Macs]) -> Callable[[Any, int, int], Macs]:
    """An S-space method: r coordinates are read from the narrower side, or the one asked for, and written to o."""

    def formula(cfg: Any, i: int, o: int) -> Macs:
        r = min(i, o, cfg.r or i)
        read = {"auto": min(i, o), "input": i, "output": o}[cfg.side]
        inner = products(cfg, r)
        return Macs(read * r + inner.token + r * o, inner.step)

    return formula


def rotation(cfg: Any, r: int) -> Macs:
    """D is applied entry by entry, as gains are. Turning what is written multiplies its blocks by those of R^T."""
    return Macs(0, (r // cfg.block_size) * cfg.block_size**3 if cfg.rotate_basis in ("U", "both") else 0)


FORMULAS: dict[str, Callable[[Any, int, int], Macs]] = {
    "lora": low_rank,
    "eva": low_rank,
    "pissa": two_factors,
    "delora": two_factors,
    "dora": dora,
    "hra": hra,
    "ia3": elementwise,
    "ia3_ff": elementwise,
    "road": elementwise,
    "antipasto": core(lambda cfg, r: Macs(0, 0)),
    "antipasto_asvd": core(lambda cfg, r: Macs(0, 0)),
    "antipasto_corda": core(lambda cfg, r: Macs(0, 0)),
    "sspace": core(lambda cfg, r: Macs(0, 0)),
    "antipasto_dplr": core(lambda cfg, r: Macs(2 * cfg.lora_rank * r, 0)),
    "antipasto_arrow": core(lambda cfg, r: Macs(cfg.block**2, 0)),
    "antipasto_ablate": core(lambda cfg, r: Macs(2 * r * cfg.k, 0)),
    "antipasto_rot": core(rotation),
    "lora_xs": core(lambda cfg, r: Macs(r * r, 0)),
}


def configs(method: str) -> Iterator[Any]:
    cls = ll.methods()[method]
    tiny: Any = cls.tiny()
    yield tiny
    for changes in ({"r": 4}, {"side": "input"}, {"side": "output"}, {"rotate_basis": "V"}, {"rotate_basis": "none"}):
        if set(changes) <= set(tiny.to_dict()) - set(tiny.unused):
            yield tiny.replace(**changes)


@pytest.mark.parametrize("method", ll.methods())
def test_the_counted_products_are_those_of_the_equations(method: str) -> None:
    assert method in FORMULAS, f"tests/lab/test_macs.py: add the products that {method!r} adds to FORMULAS"
    for cfg in configs(method):
        for i, o in ((48, 80), (80, 48), (64, 64)):
            for bias in (False, True):
                if method == "road":
                    assert o % cfg.group_size == 0
                assert added_macs(cfg, i, o, bias) == FORMULAS[method](cfg, i, o), (cfg, i, o, bias)


def test_every_formula_is_of_a_method() -> None:
    assert set(FORMULAS) == set(ll.methods())


def test_a_large_layer_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert added_macs(ll.DoRAConfig(r=16), 28672, 8192) == FORMULAS["dora"](ll.DoRAConfig(r=16), 28672, 8192)
    assert added_macs(ll.AntiPaSTOConfig(), 28672, 8192).token == 2 * 256 * 8192
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024  # KiB; one weight of that size in fp32 is 940 MB


def test_a_method_that_looks_at_values_is_counted_all_the_same() -> None:
    @dataclass(frozen=True)
    class LookingConfig(ll.AdapterConfig):
        """Looks."""

    @ll.register(LookingConfig, ll.Facts("looking", title="Looks at values", arxiv="0000.00000"))
    class Looking(ll.Adapter):
        def __init__(self, cfg: Any, i: int, o: int) -> None:
            super().__init__(cfg)
            self.A = self.parameter(o, i)

        def change(self, x: Tensor, y: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
            return x @ self.A.T if float(self.A.sum()) == 0 else y

    assert added_macs(LookingConfig(), 5, 7) == Macs(35, 0)


def test_the_base_is_counted_layer_by_layer() -> None:
    cfg = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cfg, attn_implementation="eager")
    attention = 2 * TEXT * 32  # each token's scores with, and its sum over, every token of the text
    layer = 2 * 32 * 32 + 2 * 32 * 16 + attention + 3 * 32 * 48
    assert base_macs(model) == 2 * layer + 32 * 50
