"""Law 1. The base is read-only: attach, training, save, load and detach never write a base weight. Detaching the last
adapter restores each `requires_grad`. `merge` alone writes, on request, and `unmerge` restores the bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

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


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "data": lambda layer: layer.weight.data.mul_(2),
    "a view": lambda layer: layer.weight.detach()[3].zero_(),
    "numpy": lambda layer: np.add(array := layer.bias.detach().numpy(), 1, out=array),
    "two values change places": lambda layer: layer.weight.data[0, :2].copy_(layer.weight.data[0, :2].flip(0)),
    "nan": lambda layer: layer.weight.data[0].fill_(float("nan")),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_method_that_writes_its_layer_is_refused(how: str) -> None:
    """Most of these move no version counter. The bits are put back."""

    @dataclass(frozen=True)
    class WritingConfig(ll.AdapterConfig):
        pass

    @ll.register(WritingConfig, ll.Facts("writing", title="", arxiv="", lr=1e-3, lr_range=(1e-4, 1e-2)))
    class Writing(ll.Adapter):
        def __init__(self, cfg: Any, i: int, o: int) -> None:
            super().__init__(cfg)

        def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
            WRITES[how](layer)

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
    before = bits(model)
    with pytest.raises(ll.TargetError, match=r"^0: Writing\.init wrote the base's (weight|bias); it may only read"):
        ll.attach(model, WritingConfig(target_roles=()))
    assert same_bits(before, model)
