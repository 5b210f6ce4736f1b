"""Law 1. The base is read-only: attach, training, save, load and detach never write a base weight. Detaching the last
adapter restores each `requires_grad`. `merge` alone writes, on request, and `unmerge` restores the bits.
"""

from typing import Any

import pytest
import torch

import lora_lite as ll
from helpers import (
    METHODS,
    anatomy,
    bits,
    perturb,
    same_bits,
    train,
)
from law_models import IDS, attach_tiny, llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_merge_writes_the_base(method: str, dtype: torch.dtype, tmp_path: Any) -> None:
    model = llama(dtype)
    for index, p in enumerate(model.parameters()):
        p.requires_grad_(index % 3 > 0)  # flags of both kinds, so that a blanket restore would show
    before, shape_before, keys = bits(model), anatomy(model), list(model.state_dict())
    att = attach_tiny(model, method, [IDS])
    assert same_bits(before, model)
    own = {id(p) for adapter in att.targets.values() for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own

    adapters = [adapter for adapter in att.targets.values() if adapter.facts.trained]
    if adapters:
        perturb(adapters)
        values = [bits(adapter) for adapter in adapters]
        train(model, IDS)
        assert not any(same_bits(value, adapter) for value, adapter in zip(values, adapters, strict=True))
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(model, tmp_path / "a.safetensors", name="second")
    with ll.scale(model, -2):
        model(IDS)
    assert same_bits(before, model)

    ll.detach(model, "second")
    ll.detach(model)
    assert same_bits(before, model)
    assert anatomy(model) == shape_before and list(model.state_dict()) == keys
