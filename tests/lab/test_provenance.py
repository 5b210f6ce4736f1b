"""Prints that every change of a base moves, and the commit that a process runs."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lab_helpers import make_llama
from lora_lite.lab import provenance


def negate_two(weight: Tensor) -> None:
    weight[0, 1] *= -1
    weight[0, 3] *= -1


def turn_over(weight: Tensor) -> None:
    weight.copy_(weight.flip(0))


def last_bit(weight: Tensor) -> None:
    weight.view(torch.int32)[-1, -1] ^= 1


@pytest.mark.parametrize("change", [negate_two, turn_over, last_bit])
def test_the_print_of_a_base_is_moved_by_any_change(change: Callable[[Tensor], None]) -> None:
    model = make_llama()
    first = provenance.base_fingerprint(model)
    assert provenance.base_fingerprint(make_llama()) == first
    with torch.no_grad():
        change(model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    assert provenance.base_fingerprint(model) != first


def test_buffers_that_no_file_holds_are_part_of_it() -> None:
    model = make_llama()
    first = provenance.base_fingerprint(model)
    model.model.rotary_emb.inv_freq[0] += 1
    assert "model.rotary_emb.inv_freq" not in model.state_dict() and provenance.base_fingerprint(model) != first


def test_the_commit_is_that_of_the_code_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    provenance.commit.cache_clear()
    before = provenance.commit()

    def changed(folder: Path, *arguments: str) -> str:
        raise subprocess.SubprocessError("the files have moved on")

    monkeypatch.setattr(provenance, "_git", changed)
    assert provenance.commit() == before and provenance.provenance(torch.device("cpu"))["commit"] == before
