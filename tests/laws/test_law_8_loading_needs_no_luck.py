"""Law 8. Loading needs no luck: nothing that signs, orderings or random generators can change is computed again
unverified. Initial values come from a generator seeded by (seed, path); the global one is untouched.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (
    METHODS,
    bits,
    same_bits,
)
from law_models import IDS, attach_tiny, llama


@pytest.mark.parametrize("method", METHODS)
def test_initial_values_need_no_luck(method: str) -> None:
    found = []
    for seed in (1, 2):
        model = llama()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        att = attach_tiny(model, method, [IDS])
        assert torch.equal(torch.get_rng_state(), state)
        found.append(att)
    assert found[0].targets.keys() == found[1].targets.keys()
    for path, adapter in found[0].targets.items():
        assert same_bits(bits(adapter), found[1].targets[path])


def test_initial_values_follow_seed_and_path() -> None:
    def values(seed: int, **changes: Any) -> dict[str, Tensor]:
        att = attach_tiny(llama(), "lora", [], seed=seed, **changes)
        return {path: adapter.A for path, adapter in att.targets.items()}

    first, second, part = values(0), values(1), values(0, target_names=("k_proj",))
    assert all(not torch.equal(first[path], second[path]) for path in first)
    assert all(torch.equal(first[path], part[path]) for path in part)  # whatever else is adapted
    same_shape = [A for A in first.values() if A.shape == next(iter(first.values())).shape]
    assert all(not torch.equal(same_shape[0], A) for A in same_shape[1:])
