"""Merging an adapter that was trained on a quantised base: into the weights that it saw, or into the original ones."""

import contextlib
import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lora_lite as ll
from lora_lite.errors import StateError
from lora_lite.interop.folder_copy import new_sibling
from lora_lite.interop.merged_logits import first_output
from lora_lite.lab.models.base import Base
from lora_lite.layers.linear import bias, dense, is_linear, is_quantized
from lora_lite.layers.quantization import forget_quantization
from lora_lite.merging.fold import relative

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}  # of outputs of equal weights, read again


@dataclass(frozen=True)
class QuantizedMerge:
    """||z_merged - z|| / ||z|| of the outputs on random inputs, against those of the quantised base with its adapter.

    Attributes:
        dequantised: merged into the dequantised weights.
        original: merged into the weights before quantisation.
        quantization: "4bit" or "8bit".
    """

    dequantised: float
    original: float
    quantization: str

    def __str__(self) -> str:
        return (
            f"against the {self.quantization} base with its adapter, outputs differ by {self.dequantised:.2g} where "
            f"the dequantised weights are merged into, by {self.original:.2g} where the original ones are"
        )


@torch.no_grad()
def merge_quantized(base: Base, adapter: Path, c: float, out: Path | None = None) -> QuantizedMerge:
    """Merge in memory, both ways, and measure.

    Args:
        base: the quantised base that the adapter was trained on. adapter: its file. c: the coefficient.
        out: a new folder for the merged model in dequantised weights, in the base's dtype; None: nothing is written.

    Raises:
        CheckpointError, BaseMismatchError, StateError: as `ll.load` and `ll.merge` do; `out` holds files; or what was
            written is read as another model.
    """
    with new_sibling(out) if out is not None else contextlib.nullcontext() as scratch:
        model, tokenizer = base.load()
        ll.load(model, adapter)
        with ll.scale(model, c):
            expected = _output(model)
            ll.merge(model, keep=False)
        dequantise(model, base.dtype)
        found = _output(model)
        if scratch is not None:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            _read_again(model, scratch, found, base)
        del model
        gc.collect()
        plain, _ = Base(base.model, base.dtype, base.device, "none", base.trust_remote_code).load()
        ll.load(plain, adapter)
        with ll.scale(plain, c):
            ll.merge(plain, keep=False)
        return QuantizedMerge(relative(found, expected), relative(_output(plain), expected), base.quantization)


def dequantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every quantised linear layer by a plain one of that dtype, so that what is saved is a plain model."""
    for path, layer in list(model.named_modules()):
        if is_linear(layer) and is_quantized(layer):
            b = bias(layer)
            W = dense(layer, dtype)
            plain = nn.Linear(W.shape[1], W.shape[0], b is not None, device="meta")
            plain.weight = nn.Parameter(W, requires_grad=False)
            if b is not None:
                plain.bias = nn.Parameter(b.to(dtype), requires_grad=False)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plain)
    forget_quantization(model)


def _output(model: PreTrainedModel) -> Tensor:
    output = first_output(model)
    if output is None:
        raise StateError(f"nothing tells what a {type(model).__name__} reads, so that no outputs can be compared")
    return output


def _read_again(model: PreTrainedModel, folder: Path, expected: Tensor, base: Base) -> None:
    again = type(model).from_pretrained(folder, dtype=base.dtype).to(base.device)  # pyright: ignore[reportArgumentType]
    if not (error := relative(_output(again), expected)) <= ROUNDING[base.dtype]:
        raise StateError(f"merge: what was saved is read as another model: outputs differ by {error:.2g}")
