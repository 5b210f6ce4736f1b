"""Published sizes of adapters on Qwen3.5-0.8B's down_proj (3584 -> 1024, 24 layers), from shapes alone."""

from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite.lab.macs import added_macs

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
    cls: Any = ll.variants()[method]
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
    plain, rotated = (added_macs(cfg, I, O) for cfg in (ll.AntiPaSTOConfig(), ll.AntiPaSTORotConfig()))
    assert plain.step == 0 and rotated.token == plain.token + 256 * 256
    dora = added_macs(ll.DoRAConfig(r=32), I, O)
    assert dora.token == 32 * (I + O) and dora.step > 0
