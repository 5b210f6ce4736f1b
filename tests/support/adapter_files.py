"""Adapter files to tamper with, and models that must refuse them unharmed."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import lora_lite as ll
from helpers import anatomy, bits, perturb, same_bits
from lora_lite.files.format import METADATA_KEY, checksum

Header, Tensors = dict[str, Any], dict[str, Tensor]


class Net(nn.Module):
    def __init__(self, hidden: int = 5, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.norm = nn.Linear(6, hidden), nn.Linear(hidden, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.tanh(self.first(x))))


X = torch.linspace(-1, 1, 18).reshape(3, 6)
CONFIG = ll.LoRAConfig(r=2, target_roles=())


def live_net(seed: int = 3) -> Net:
    model = Net()
    att = ll.attach(model, CONFIG, train_also=("norm.weight",))
    perturb(att.targets.values(), seed=seed)
    return model


def parts(data: bytes) -> tuple[Header, Tensors]:
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    return json.loads(metadata[METADATA_KEY]), from_bytes(data)


def forged(header: Any, tensors: Tensors) -> bytes:
    """A file with a checksum that fits, as someone who wants to do harm would write it."""
    if isinstance(header, dict) and "checksum" in header:
        header = {**header, "checksum": checksum({k: v for k, v in header.items() if k != "checksum"}, tensors)}
    return to_bytes(tensors, {METADATA_KEY: json.dumps(header)})


@functools.cache
def victims() -> list[tuple[nn.Module, bool, Any]]:
    """A bare model and one with a live adapter to overwrite, and all that there is to know of them."""
    return [(model, overwrite, seen(model)) for model, overwrite in ((Net(), False), (live_net(seed=4), True))]


def seen(model: nn.Module) -> Any:
    state = model.__dict__.get("_lora_lite")
    return bits(model), anatomy(model), model(X).detach().clone(), repr(state)


def unchanged(model: nn.Module, before: Any) -> bool:
    now = seen(model)
    return (
        same_bits(before[0], model) and now[1] == before[1] and torch.equal(now[2], before[2]) and now[3] == before[3]
    )


def refused(data: bytes, folder: Path, words: str | None = None) -> None:
    """Both victims refuse the file and stay what they are."""
    path = folder / "bad.safetensors"
    path.write_bytes(data)
    for model, overwrite, before in victims():
        with pytest.raises(ll.CheckpointError, match=words) as caught:
            ll.load(model, path, overwrite=overwrite)
        assert str(path) in str(caught.value)
        assert unchanged(model, before)
