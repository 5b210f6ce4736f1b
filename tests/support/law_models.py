"""What the tests of the laws share: models, inputs, and attaching a method's tiny config."""

from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import (
    calibration,
    tiny,
    tiny_llama,
    token_ids,
)

SHAPES = [(16, 24), (24, 16), (16, 16)]
BASE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = token_ids()


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_llama(dtype, num_hidden_layers=1, attention_bias=True, mlp_bias=True)


def inputs(i: int, dtype: torch.dtype, rows: int = 5) -> Tensor:
    return torch.randn(rows, 7, i, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


def attach_tiny(model: nn.Module, method: str, batches: Any, name: str = "default", **changes: Any) -> ll.Attachment:
    cfg = tiny(method, **changes)
    return ll.attach(model, cfg, calibration(cfg, batches), name=name)
