"""Small models of quantised layers, of bitsandbytes and torchao, on the CPU."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lora_lite.layers.packing import forbid_packing

I, H, O = 128, 256, 64


def four_bit(plain: nn.Linear, **options: Any) -> Any:
    quantized = bitsandbytes.nn.Linear4bit(
        plain.in_features,
        plain.out_features,
        plain.bias is not None,
        **{"compute_dtype": plain.weight.dtype, "quant_type": "nf4", **options},
    )
    quantized.load_state_dict(plain.state_dict())
    return quantized.to("cpu")  # this is what quantises


def packed(plain: nn.Linear, **options: Any) -> Any:
    """As it is on a CPU with AVX-512 bf16 after its first eval forward."""
    layer = four_bit(plain, **options)
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.support_avx512bf16_for_cpu = True
    return layer


def eight_bit(plain: nn.Linear) -> nn.Module:
    quantized = bitsandbytes.nn.Linear8bitLt(
        plain.in_features, plain.out_features, plain.bias is not None, has_fp16_weights=False, threshold=0.0
    )
    quantized.load_state_dict(plain.state_dict())
    return quantized.to("cpu")


def int8_weights(plain: nn.Linear) -> nn.Module:
    holder = nn.Sequential(plain)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0]


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "Linear4bit": four_bit, "Linear4bit-packed": packed, "Linear8bitLt": eight_bit, "torchao-int8": int8_weights,
}  # fmt: skip
ROUNDS_INPUTS = {"Linear8bitLt"}  # LLM.int8 rounds each row of activations to 8 bits as well


class Net(nn.Module):
    """Two quantised layers, with and without bias, and a plain head that tells the dtype."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = [nn.Linear(I, H), nn.Linear(H, O, bias=False), nn.Linear(O, 8)]
        self.first, self.second = (KINDS[kind](layer.to(dtype)) for layer in plain[:2])
        self.head = plain[2].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.tanh(self.first(x)))))


def net(kind: str, dtype: torch.dtype = torch.float32) -> Net:
    """In eval mode, after one forward: bitsandbytes rearranges its tensors in the first."""
    model = Net(kind, dtype).eval()
    if kind != "Linear4bit-packed":  # whose kernel not every CPU has
        with torch.no_grad():
            model(inputs(dtype))
    return model


def bare(model: Any) -> Any:
    """A copy of the base that computes from unpacked weights, as it does while adapters are attached."""
    base = copy.deepcopy(model)
    forbid_packing(base)
    return base


def inputs(dtype: torch.dtype = torch.float32, rows: int = 20) -> Tensor:
    return torch.randn(rows, I, generator=torch.Generator().manual_seed(1)).to(dtype)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


QUANTIZED: dict[str, Any] = {"target_names": ("first", "second")}
