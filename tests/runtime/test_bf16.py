"""A bf16 base: what starts at exactly 0 or 1 does move, and merging loses no more than the final rounding."""

from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from helpers import METHODS, OneLayer, calibration, perturb, relative, tiny, tiny_llama, token_ids

BF16 = torch.bfloat16
EPS = torch.finfo(BF16).eps  # 7.8e-3: the distance of neighbours near 1


def attached(model: nn.Module, method: str, data: Any, **changes: Any) -> ll.Attachment:
    cfg = tiny(method, **changes)
    return ll.attach(model, cfg, calibration(cfg, [data]))


def one_step(model: nn.Module, method: str) -> None:
    """One AdamW step at the method's own learning rate, towards a random target."""
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=ll.methods()[method].facts.lr))
    ids = token_ids()
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    optimizer.step()


TRAINED = [method for method in METHODS if ll.methods()[method].facts.trained]


@pytest.mark.parametrize("method", TRAINED)
def test_tensors_that_start_at_zero_or_one_move(method: str) -> None:
    """In fp32 tensors on a bf16 model, and the model's output with them."""
    model = tiny_llama(BF16)
    att = attached(model, method, {"input_ids": token_ids()})
    start = {(path, key): p.detach().clone() for path, a in att.targets.items() for key, p in a.named_parameters()}
    assert {value.dtype for value in start.values()} == {torch.float32}
    moved = {key: torch.zeros_like(value) for key, value in start.items()}
    with torch.no_grad():
        before = model(input_ids=token_ids()).logits
    for _ in range(3):  # the gradient of a LoRA's A is zero until B has moved; later steps may turn back
        one_step(model, method)
        for (path, key), value in start.items():
            now = att.targets[path].get_parameter(key).detach()
            moved[path, key] = torch.maximum(moved[path, key], (now - value).abs())
    for key, distance in moved.items():  # a step of AdamW is about lr for every entry with a gradient
        assert float((distance > 0.5 * ll.methods()[method].facts.lr).float().mean()) > 0.9, key
    with torch.no_grad():
        assert not torch.equal(model(input_ids=token_ids()).logits, before)


@pytest.mark.parametrize("method", TRAINED)
def test_the_output_moves_the_right_way(method: str) -> None:
    """In the direction in which an fp64 copy of the model moves."""
    outputs = {}
    for dtype in (BF16, torch.float64):
        model = tiny_llama().to(BF16).to(dtype)
        att = attached(model, method, {"input_ids": token_ids()})
        perturb(att.targets.values(), 0.05)
        with torch.no_grad():
            y = model(input_ids=token_ids()).logits.double()
            with ll.disabled(model):
                base = model(input_ids=token_ids()).logits.double()
        outputs[dtype] = y - base
    cosine = torch.cosine_similarity(outputs[BF16].flatten(), outputs[torch.float64].flatten(), dim=0)
    assert outputs[BF16].any()
    assert float(cosine) > 0.9


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("method", [method for method in METHODS if ll.methods()[method].facts.affine])
def test_a_layers_change_is_the_fp64_one_to_rounding(method: str, size: float) -> None:
    """The change itself, not the output it is added to: what is small must not be formed from what is large."""
    model = OneLayer(48, 32, dtype=BF16)
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(1)).to(BF16)
    att = attached(model, method, x)
    perturb(att.targets.values(), size)
    adapter: Any = att.targets["layer"]
    layer = model.layer
    c = torch.ones((), dtype=torch.float64)
    with torch.no_grad():
        y = nn.functional.linear(x, layer.weight, layer.bias)
        turned = adapter.before(x, layer, c)
        change = adapter.change(turned, y, layer, c)
        if adapter.acts() == "before":
            found = (turned.double() - x.double()) @ layer.weight.double().T
        elif isinstance(change, tuple):
            found = change[0].double() @ change[1].double().T
        else:
            found = change.double()
    exact = ll.merged_weights(model.to(torch.float64))
    W, b = layer.weight.double(), layer.bias.double()
    expected = x.double() @ (exact["layer.weight"] - W).T + exact["layer.bias"] - b
    noise = relative(expected + x.double() @ W.T + b, x.double() @ W.T + b)
    # A rounding of the input or the output moves everything by EPS / 2, which is EPS / (2 noise) of the change; a
    # method that acts before W has no other way.
    allowed = 2 * EPS + (EPS / noise if adapter.acts() == "before" else 0.0)
    assert relative(found, expected.detach()) <= allowed
