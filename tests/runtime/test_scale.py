"""The coefficient: its errors, when it takes effect, and one value per batch row, through `generate` too."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, OneLayer, attached, relative, tiny_llama, token_ids

IDS = token_ids()


def adapted(method: str = "lora", **changes: Any) -> nn.Module:
    model = tiny_llama(num_hidden_layers=1, **changes)
    attached(model, method, [IDS])
    return model


def test_it_takes_effect_at_once_and_the_context_restores() -> None:
    model = adapted()
    full = model(IDS).logits
    with ll.scale(model, 0.5):
        half = model(IDS).logits
    ll.scale(model, 0.5)  # no context: it stays
    assert torch.equal(model(IDS).logits, half)
    with ll.scale(model, -1), pytest.raises(KeyError), ll.scale(model, 3):
        raise KeyError
    assert torch.equal(model(IDS).logits, half)
    with ll.disabled(model):
        assert not torch.equal(model(IDS).logits, half)
    ll.scale(model, 1)
    assert torch.equal(model(IDS).logits, full)


def test_the_tensor_given_is_copied_in_effect() -> None:
    """Writing to the caller's tensor later turns nothing (0-dim and per-row alike)."""
    model = adapted()
    for c in (torch.tensor(0.5), torch.full((3,), 0.5), torch.tensor(0.5).double(), torch.full((3,), 0.5).double()):
        with ll.scale(model, c):
            before = model(IDS).logits
            c.fill_(5)
            assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("c", "match"),
    [
        ({"other": 1.0}, r"no adapter named \['other'\]; attached: default"),
        (float("nan"), "is nan; give a finite number"),
        (float("inf"), "is inf; give a finite number"),
        (torch.tensor(float("nan")), "is not finite"),
        (torch.tensor([0.0, float("-inf"), 1.0]), "is not finite"),
        (torch.ones(3, 1), r"tensor of shape \(3, 1\); give a 0-dim tensor, or one of shape \(B,\)"),
        (torch.tensor([True, False, True]), "is a torch.bool tensor"),
        (torch.tensor(1j), "is a torch.complex64 tensor"),
        (True, "is True; give a finite number"),
        ({"default": float("nan")}, "is nan"),
    ],
)
def test_a_coefficient_that_cannot_be_used(c: Any, match: str) -> None:
    model = adapted()
    full = model(IDS).logits
    with pytest.raises(ll.CoefficientError, match=match):
        ll.scale(model, c)
    assert torch.equal(model(IDS).logits, full)


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_a_wrong_number_of_rows(rows: int) -> None:
    model = adapted()
    if rows == 1:  # one coefficient stands for every row that it is expanded to
        with ll.scale(model, torch.tensor([0.5])):
            found = model(IDS).logits
        with ll.scale(model, 0.5):
            assert torch.equal(found, model(IDS).logits)
        return
    with ll.scale(model, torch.ones(rows)), pytest.raises(ll.CoefficientError, match=rf"{rows} coefficients, one per"):
        model(IDS)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_separate_runs(method: str) -> None:
    model = tiny_llama(torch.float64, num_hidden_layers=1)
    attached(model, method, [IDS])
    c = torch.tensor([0.0, 1.0, -0.6])
    with ll.scale(model, c):
        together = model(IDS).logits
    for row in range(3):
        with ll.scale(model, c[row]):
            assert relative(together[row], model(IDS).logits[row]) < 1e-13


class Flat(nn.Module):
    """A block that flattens its (B, T, d) input to (B T, d), as mixture-of-experts blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, reorder: bool = False) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = self.first(flat[: flat.shape[0] // 2] if reorder else flat).tanh()
        return self.second(h).reshape(-1, *x.shape[1:])


def test_flattened_rows() -> None:
    model, x = Flat(), torch.randn(4, 5, 8)
    attached(model, "lora")
    c = torch.tensor([0.0, 1.0, -2.0, 0.5])
    with ll.scale(model, c):
        found = model(x)
        plain = model(x[:, 0])  # 2-D inputs whose rows are the batch's
    for row in range(4):
        with ll.scale(model, c[row]):
            torch.testing.assert_close(found[row], model(x)[row], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(plain[row], model(x[:, 0])[row], atol=1e-6, rtol=1e-6)
    # Half of the tokens, as an expert gets: which rows they are is not known.
    with ll.scale(model, c), pytest.raises(ll.CoefficientError, match="cannot be matched"):
        model(x, reorder=True)
    with ll.scale(model, c), pytest.raises(ll.CoefficientError, match="cannot be matched"):
        model.first(x.reshape(-1, 8))  # outside of a call of the model nothing tells B from T


def test_a_failed_call_leaves_no_trace() -> None:
    """The rows of a call that raised do not speak for the next one."""
    model, x = Flat(), torch.randn(4, 5, 8)
    attached(model, "lora")
    with ll.scale(model, torch.ones(4)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(4, 5, 9))
        with pytest.raises(ll.CoefficientError, match="cannot be matched"):
            model.first(x.reshape(-1, 8))


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("settings", GENERATE.values(), ids=GENERATE)
def test_generate(settings: dict[str, Any]) -> None:
    """Greedy and by beams, with the cache: per-row c gives what each row gives by itself. In fp64, so that no choice
    between two tokens hangs on rounding."""
    model = tiny_llama(torch.float64)
    attached(model, "lora", size=0.3)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    c = torch.tensor([0.0, 1.0, -2.0])

    def generate(ids: Tensor) -> Tensor:
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        padded = torch.zeros(tokens.shape[0], 7 + 8, dtype=tokens.dtype)
        padded[:, : tokens.shape[1]] = tokens
        return padded

    with ll.scale(model, c):
        together = generate(IDS)
    alone = []
    for row in range(3):
        with ll.scale(model, c[row]):
            alone.append(generate(IDS[row : row + 1]))
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(generate(IDS), together)  # the coefficient matters for the tokens
    base = tiny_llama(torch.float64).generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    assert torch.equal(alone[0][:, : base.shape[1]], base)


def test_sampling_expands_rows_in_order() -> None:
    model = tiny_llama()
    attached(model, "lora")
    c = torch.tensor([0.0, 1.0, -2.0])
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda layer, args, y: seen.append(y))
    ids = IDS.repeat_interleave(2, dim=0)
    with ll.scale(model, c):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=True, num_return_sequences=2,
                       max_new_tokens=2, pad_token_id=0)  # fmt: skip
    with ll.scale(model, c.repeat_interleave(2)):
        model(ids)
    assert torch.equal(seen[0], seen[-1])


def test_only_generate_expands_rows() -> None:
    """Four rows are not two rows twice, and images are not rows."""
    model = adapted()
    match = "2 coefficients, one per batch row, but the model was called with 4 rows"
    with ll.scale(model, torch.tensor([0.0, 1.0])), pytest.raises(ll.CoefficientError, match=match):
        model(IDS[:1].repeat(4, 1))
    with ll.scale(model, torch.ones(3)), pytest.raises(ll.CoefficientError, match="cannot be matched"):
        model.model.layers[0].mlp.up_proj(torch.randn(6, 2, 32))


class Seeing(nn.Module):
    """Text of one embedding a token, and the mean of its row's images added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, pixels: Tensor, inputs_embeds: Tensor, images: list[int]) -> Tensor:
        seen = self.tower(pixels).mean(1).split(images)
        return self.text(inputs_embeds + torch.stack([each.mean(0) for each in seen]).unsqueeze(1))


def test_images_of_several_rows() -> None:
    model, pixels, text = Seeing(), torch.randn(4, 3, 8), torch.randn(2, 5, 8)
    attached(model, "lora", target_names=("text",))
    c = torch.tensor([0.0, 1.0])
    with ll.scale(model, c):
        found = model(pixels=pixels, inputs_embeds=text, images=[3, 1])
    for row in range(2):
        with ll.scale(model, c[row]):
            alone = model(pixels=pixels, inputs_embeds=text, images=[3, 1])
        torch.testing.assert_close(found[row], alone[row])
    attached(model, "lora", name="tower", target_names=("tower",))
    with ll.scale(model, c), pytest.raises(ll.CoefficientError, match=r"input of shape \(4, 3, 8\), whose rows"):
        model(pixels=pixels, inputs_embeds=text, images=[3, 1])


def test_replicas_of_data_parallel_are_refused_within_a_block() -> None:
    """They run in threads that no block reaches; what a bare `scale` sets reaches them."""
    model = OneLayer(8, 8).float()
    attached(model, "lora", [torch.randn(4, 8)], size=0.2)
    x, replica = torch.randn(4, 8), model._replicate_for_data_parallel()  # type: ignore[operator]
    replica.layer = model.layer
    with (
        ll.scale(model, 0.5),
        ThreadPoolExecutor() as pool,
        pytest.raises(ll.StateError, match=r"nn\.DataParallel runs"),
    ):
        pool.submit(replica, x).result()
    ll.scale(model, 0.5)
    with ThreadPoolExecutor() as pool:
        assert torch.equal(pool.submit(replica, x).result(), model(x))


@pytest.mark.parametrize("method", ["lora", "ia3_ff", "hra", "dora"])
def test_torchs_encoder_has_gradients_in_eval_mode(method: str) -> None:
    """There the frozen base would hand its second layer nested tensors, which attention takes without gradients."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    adapters = attached(model, method, [x], target_names=("linear1", "linear2"), size=0.2).targets
    trained = [p for adapter in adapters.values() for p in adapter.parameters()]
    y = model(x, src_key_padding_mask=padding)[~padding]
    found = torch.autograd.grad(y.square().sum(), trained)
    model.use_nested_tensor = False
    expected = torch.autograd.grad(model(x, src_key_padding_mask=padding)[~padding].square().sum(), trained)
    for grad, other in zip(found, expected, strict=True):
        assert relative(grad, other) < 1e-5
    model.use_nested_tensor = True
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], y, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "ia3_ff", "hra", "dora"])
@torch.no_grad()
def test_torchs_encoder_with_a_padding_mask(method: str) -> None:
    """In eval mode it gives its layers nested tensors, without padding."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    base = model(x, src_key_padding_mask=padding)
    attached(model, method, [x], target_names=("linear1", "linear2"), size=0.2)
    c = torch.tensor([0.0, 1.0, -2.0])
    with ll.scale(model, c):
        nested = model(x, src_key_padding_mask=padding)
        model.use_nested_tensor = False
        padded = model(x, src_key_padding_mask=padding)
    keep = ~padding
    torch.testing.assert_close(nested[keep], padded[keep], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(nested[0], base[0], atol=2e-6, rtol=1e-5)
    assert relative(nested[1][keep[1]], base[1][keep[1]]) > 1e-3


class Merging(nn.Module):
    """Patches of two images of 28 and 4, four merged to one, so that 8 rows come as for a batch of 2 with 4 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(8, 8)

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        return self.tower(pixels.view(8, 4, 8).mean(1))


def test_merged_patches_are_no_flattened_batch() -> None:
    model = Merging()
    attached(model, "lora", target_names=("tower",))
    with ll.scale(model, torch.tensor([0.0, 1.0])), pytest.raises(ll.CoefficientError, match="whose rows cannot be"):
        model(pixels=torch.randn(32, 8), input_ids=torch.ones(2, 4, dtype=torch.long))
