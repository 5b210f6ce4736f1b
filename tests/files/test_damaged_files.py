"""Files damaged by accident: each is refused by a `CheckpointError`, and the model stays as it was."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_bytes
from torch import nn

import lora_lite as ll
from adapter_files import Net, X, forged, live_net, parts, refused
from helpers import anatomy, bits, same_bits

pytestmark = pytest.mark.usefixtures("as_installed")
FUZZ = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return ll.save(live_net(), tmp_path_factory.mktemp("good") / "adapter.safetensors").read_bytes()


def test_the_good_file_loads(good: bytes, tmp_path: Path) -> None:
    header, tensors = parts(good)
    assert forged(header, tensors) == good
    (tmp_path / "good").write_bytes(good)
    expected = live_net()(X)
    for model, overwrite in ((Net(), False), (live_net(seed=4), True)):
        ll.load(model, tmp_path / "good", overwrite=overwrite)
        assert torch.equal(model(X), expected)


# Damage by accident


@FUZZ
@given(data=st.data())
def test_truncated(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    refused(good[: data.draw(st.integers(0, len(good) - 1))], tmp_path, "no whole safetensors file|was not written by")


@FUZZ
@given(data=st.data())
def test_a_flipped_bit(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    refused(bytes(flipped), tmp_path)


@FUZZ
@given(data=st.data())
def test_bytes_written_over(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(good) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=40))
    changed = good[:start] + patch + good[start + len(patch) :]
    if changed != good:
        refused(changed, tmp_path)


@pytest.mark.slow
def test_every_length_and_every_bit(good: bytes, tmp_path: Path) -> None:
    for length in range(len(good)):
        refused(good[:length], tmp_path)
    for position in range(len(good)):
        for bit in range(8):
            refused(good[:position] + bytes([good[position] ^ (1 << bit)]) + good[position + 1 :], tmp_path)


@pytest.mark.parametrize("junk", [b"", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 100, b"\x80\x04\x95" * 50])
def test_other_kinds_of_file(junk: bytes, tmp_path: Path) -> None:
    refused(junk, tmp_path, "no whole safetensors file")


def test_bytes_at_the_end(good: bytes, tmp_path: Path) -> None:
    refused(good + b"\0", tmp_path, "no whole safetensors file")
    refused(good + good, tmp_path, "no whole safetensors file")


def test_another_programs_safetensors(good: bytes, tmp_path: Path) -> None:
    tensors = parts(good)[1]
    refused(to_bytes(tensors), tmp_path, "was not written by lora-lite")
    refused(to_bytes(tensors, {"format": "pt"}), tmp_path, "was not written by lora-lite")


# Files for another model


@pytest.mark.parametrize(
    ("model", "words", "error"),
    [
        (Net(hidden=7), r"first maps \(6, 7\) here, but \(6, 5\) in the file", ll.CheckpointError),
        (nn.Sequential(nn.Linear(6, 5)), "the model has no linear layer first", ll.CheckpointError),
        (nn.ModuleDict({"first": nn.LayerNorm(5)}), "the model has no linear layer first", ll.CheckpointError),
        (Net(seed=1), "trained on another base model; worst layer", ll.BaseMismatchError),
    ],
    ids=["shape", "paths", "no linear layer", "weights"],
)
def test_another_model(model: nn.Module, words: str, error: type[Exception], good: bytes, tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(good)
    before, form = bits(model), anatomy(model)
    with pytest.raises(error, match=words):
        ll.load(model, tmp_path / "good")
    assert same_bits(before, model) and anatomy(model) == form
