"""`check` measures backward against finite differences: no false alarm on true gradients, no miss of cut ones."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_lite as ll
import quantized_models as quantized
from helpers import METHODS, bits, calibration, same_bits, tiny, tiny_llama, token_ids

IDS = token_ids()
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
TRAINED = [name for name in METHODS if ll.methods()[name].facts.trained]
SLOW = (torch.float64, torch.float16, torch.bfloat16)
DTYPES = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in SLOW)]
FINE = {torch.float64: 2e-2, torch.float32: 2e-2, torch.float16: 0.15, torch.bfloat16: 0.25}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", TRAINED)
def test_true_gradients_pass(method: str, dtype: torch.dtype) -> None:
    model, cfg = tiny_llama(dtype, num_hidden_layers=1), tiny(method)
    ll.attach(model, cfg, calibration(cfg, [IDS]))
    found = ll.check(model, [IDS]).gradient
    assert found is not None and not found.wrong
    if found.error is not None:
        assert found.error <= FINE[dtype] and f"ratio {found.ratio:.3f}" in str(found)
    else:
        assert dtype in (torch.bfloat16, torch.float16) and "cannot be measured" in str(found)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_no_alarm(method: str, dtype: torch.dtype) -> None:
    test_true_gradients_pass(method, dtype)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear4bit-packed", "Linear8bitLt", "torchao-int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_weights_are_no_alarm(kind: str, dtype: torch.dtype) -> None:
    model = quantized.Net(kind, dtype).eval()
    ll.attach(model, tiny("lora", **quantized.QUANTIZED))
    report = ll.check(model, [quantized.inputs(dtype)])
    assert report.gradient is not None and not report.gradient.wrong and not report.cut_layers


class Backward(torch.autograd.Function):
    """x, with a backward that is wrong by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.5


class Nothing(torch.autograd.Function):
    """0, although it passes gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Blocks(nn.Module):
    """Residual blocks, so that every adapter gets some gradient; `how` says what is wrong in the base."""

    def __init__(self, how: str = "fine", depth: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
            self.plain, self.head = nn.Linear(16, 16), nn.Linear(16, 24)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            h = block(x)
            x = x + torch.tanh(Nothing.apply(h) if self.how == "one without effect" and index == 1 else h)
        if self.how == "detached":
            return self.head(x + 2 * torch.tanh(self.plain(x.detach())))
        if self.how == "wrong backward":
            x = x + Backward.apply(2 * self.plain(x))
        if self.how == "noise":
            x = x + 0.5 * random.random()  # torch's seed does not hold it
        return self.head(x)


def blocks(how: str) -> Blocks:
    model = Blocks(how)
    ll.attach(model, tiny("lora", target_names=("blocks",)))
    return model


def test_blocks_are_fine() -> None:
    report = ll.check(blocks("fine"), [X])
    assert report.gradient is not None and report.gradient.error is not None and report.gradient.error < 1e-2
    assert abs(report.gradient.ratio - 1) < 1e-2 and "ratio 1.0" in str(report)  # type: ignore[operator]


@pytest.mark.parametrize("how", ["detached", "wrong backward"])
def test_a_cut_in_the_base_is_found(how: str) -> None:
    model = blocks(how)
    before = bits(model)
    with pytest.raises(
        ll.CheckError, match=r"the gradients are not those of the loss: .*ratio .*cuts or replaces what"
    ):
        ll.check(model, [X])
    assert same_bits(before, model)


def test_an_adapter_without_effect_is_named_although_it_gets_a_gradient() -> None:
    with pytest.raises(ll.CheckError, match=r"'default' on blocks\.1 changes no output although it gets a gradient"):
        ll.check(blocks("one without effect"), [X])


def test_what_cannot_be_measured_is_said_and_no_error() -> None:
    report = ll.check(blocks("noise"), [X[:1]])
    assert report.gradient is not None and report.gradient.error is None and not report.gradient.wrong
    assert "cannot be measured (differences at several step sizes do not agree" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_train_also_is_measured_and_put_back(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype, num_hidden_layers=1)
    ll.attach(model, tiny("lora"), train_also=("lm_head", "norm"))
    before = bits(model)
    report = ll.check(model, [{"input_ids": IDS, "labels": IDS}])
    assert report.gradient is not None and not report.gradient.wrong
    assert same_bits(before, model)


def test_dora_keeps_its_norm_constant_on_purpose() -> None:
    model = tiny_llama()
    ll.attach(model, tiny("dora"))
    adapters = [module for module in model.modules() if isinstance(module, ll.Adapter)]
    assert not ll.check(model, [IDS]).gradient.wrong  # type: ignore[union-attr]
    for adapter in adapters:
        adapter.inexact = ()  # type: ignore[misc]
    with pytest.raises(ll.CheckError, match="names the tensors in its `inexact`"):
        ll.check(model, [IDS])


class FusedHead(nn.Module):
    """As a trainer's fused log-probabilities: in training the head's weight is read, and the layer not called."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama(num_hidden_layers=1)

    def forward(self, ids: Tensor) -> Tensor:
        if not self.training:
            return self.llama(ids).logits
        return F.linear(self.llama.model(ids).last_hidden_state, self.llama.lm_head.weight).log_softmax(-1)


def test_a_head_that_training_reads_past_its_layer() -> None:
    model = FusedHead()
    ll.attach(model, tiny("lora", target_names=("lm_head", "q_proj")))
    model.eval()
    with pytest.raises(ll.CheckError, match=r"llama\.lm_head ran in eval mode but not in train mode"):
        ll.check(model, [IDS])
    assert not model.training


class Unused(nn.Module):
    """The second layer is called, and what it gives is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.second(x)
        return self.first(x)


def test_an_adapter_without_gradient_must_move_an_output_too() -> None:
    model = Unused()
    ll.attach(model, tiny("lora", target_names=("first",)))
    other = ll.attach(model, tiny("lora", target_names=("second",)), name="frozen")
    for adapter in other.targets.values():
        adapter.requires_grad_(False)
    with pytest.raises(ll.CheckError, match=r"'frozen' on second ran, but leaving it out changes no output"):
        ll.check(model, [X])


@pytest.mark.parametrize("tower", [None, "text_model", "vision_model"])
def test_either_tower_of_clip(tower: str | None) -> None:
    """Of which one leaves most outputs alone, and whose table of logits compares every row with every other."""
    from zoo import ARCHITECTURES

    arch = ARCHITECTURES["clip"]
    model = arch.make()
    names: dict[str, Any] = {} if tower is None else {"target_names": (tower,), "target_roles": ()}
    ll.attach(model, ll.LoRAConfig(r=2).replace(**names))
    report = ll.check(model, [arch.inputs()])
    assert report.effect > 0 and report.rows_independent is True
    assert all(layer.moves for layer in report.layers["default"].values())


class Pictures(nn.Module):
    """Text and images; each image belongs to a row of text. `flat`: the tower reads patches, not images."""

    def __init__(self, owners: list[int], flat: bool = False) -> None:
        super().__init__()
        self.words, self.tower, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.owners, self.flat = torch.tensor(owners), flat

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        n = pixel_values.shape[0]
        seen = self.tower(pixel_values.flatten(0, 1)).view(n, -1, 16) if self.flat else self.tower(pixel_values)
        text = self.words(input_ids).mean(1)
        return self.head(text.index_add(0, self.owners, torch.tanh(seen).mean(1)))


@pytest.mark.parametrize(
    ("owners", "flat", "independent"),
    [
        ([0, 1], False, True),
        ([0, 0], False, False),  # as many images as rows, and both of row 0
        ([1, 0], False, False),
        ([0, 0, 0, 1], False, None),  # refused, for 4 images are no 2 rows
        ([0, 0, 0, 1], True, None),  # so are 4 images of 2 patches, that look like 2 rows of 4 tokens,
        ([0, 0, 1, 1], True, None),  # even where they are what they look like: nothing tells
    ],
)
def test_rows_of_images_spread_over_rows_of_text(owners: list[int], flat: bool, independent: bool | None) -> None:
    model = Pictures(owners, flat)
    ll.attach(model, tiny("lora", target_names=("tower",)))
    batch = {
        "input_ids": torch.randint(9, (2, 4), generator=torch.Generator().manual_seed(0)),
        "pixel_values": torch.randn(len(owners), 2, 16, generator=torch.Generator().manual_seed(0)),
    }
    if independent is False:
        with pytest.raises(ll.CheckError, match="a part of it has other rows"):
            ll.check(model, [batch])
        return
    assert ll.check(model, [batch]).rows_independent is independent
