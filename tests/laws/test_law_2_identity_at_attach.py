"""Law 2. Identity at attach: right after attach the outputs equal the base's, to the bit; a method that cannot
declares a bound per dtype, and is held to it.
"""

import pytest
import torch

import lora_lite as ll
from helpers import (
    METHODS,
    OneLayer,
)
from law_models import BASE_DTYPES, IDS, SHAPES, attach_tiny, inputs, llama


@pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_identity_at_attach_of_one_layer(method: str, dtype: torch.dtype) -> None:
    for i, o in SHAPES:
        for bias in (True, False):
            model, x = OneLayer(i, o, bias, dtype), 3 * inputs(i, dtype)
            base = model(x)
            att = attach_tiny(model, method, [x])
            adapter = att.targets["layer"]
            with ll.scale(model, 1.0 if adapter.facts.trained else 0.0):
                found = model(x)
            error = float((found - base).abs().max().detach() / base.abs().max().detach())
            assert found.dtype == dtype
            assert error <= adapter.identity_bound(adapter.cfg, dtype)


@pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_identity_at_attach_of_a_model(method: str, dtype: torch.dtype) -> None:
    model = llama(dtype)
    base = model(IDS).logits
    att = attach_tiny(model, method, [IDS])
    adapters = list(att.targets.values())
    with ll.scale(model, 1.0 if adapters[0].facts.trained else 0.0):
        found = model(IDS).logits
    assert torch.isfinite(base).all()
    bound = max(adapter.identity_bound(adapter.cfg, dtype) for adapter in adapters)
    if bound == 0:
        assert torch.equal(found, base)
    else:  # errors of layers in sequence at most add up here, since norms keep the residual stream's size
        assert float((found - base).abs().max() / base.abs().max()) <= bound * len(adapters)
