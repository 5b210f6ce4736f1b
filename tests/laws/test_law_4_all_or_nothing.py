"""Law 4. All or nothing: attach and load succeed wholly, or leave the model exactly as it was. (Ctrl-C at any line:
runtime/test_interrupts.py.)
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import (
    METHODS,
    anatomy,
    attached,
    bits,
    calibration,
    same_bits,
    tiny,
)
from law_models import attach_tiny


class Broken(RuntimeError):
    pass


def _fault(method: str, where: str, monkeypatch: pytest.MonkeyPatch, data: list[Tensor]) -> Any:
    """Make the third layer's `where` raise, or the calibration data after its first batch. Returns the data."""
    if where == "calibration":

        def batches() -> Any:
            yield data[0]
            raise Broken

        return batches()
    original, calls = getattr(ll.methods()[method], where), []

    def fault(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise Broken
        original(*args, **kwargs)

    monkeypatch.setattr(ll.methods()[method], where, fault)
    return data


@pytest.mark.parametrize("first", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("method", METHODS)
def test_attach_is_all_or_nothing(method: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the middle leaves bits, flags, hooks, modes and attributes as they were."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.Dropout(), nn.Linear(16, 16), nn.Linear(16, 8))
    data = [torch.randn(12, 16)]
    cfg = tiny(method)
    if first:
        attached(model, "lora", name="first")
    before, shape_before = bits(model), anatomy(model)
    moments = ["init", "derive", *(["calibration"] if ll.methods()[method].needs(cfg) else [])]
    for where in moments:
        with monkeypatch.context() as patch, pytest.raises(Broken):
            ll.attach(model, cfg, calibration(cfg, _fault(method, where, patch, data)), name="second")
        assert same_bits(before, model) and set(before) == set(bits(model))
        assert anatomy(model) == shape_before
    attach_tiny(model, method, data, name="second")


@pytest.mark.parametrize("cfg", [ll.RoadConfig(group_size=12, target_roles=()), ll.LoRAXSConfig(r=20, target_roles=())])
def test_a_layer_that_does_not_fit_leaves_all_others_bare(cfg: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 16))
    before, shape_before = bits(model), anatomy(model)
    with pytest.raises(ll.TargetError, match=r"^1: (group_size|r) = \d+"):
        ll.attach(model, cfg)
    assert same_bits(before, model) and anatomy(model) == shape_before
