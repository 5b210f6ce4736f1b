"""Saves that fail leave what was there before, and nothing else."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

import lora_lite as ll
from helpers import attached, perturb, tiny_llama

NARROW = ll.LoRAConfig(r=2, target_names=("q_proj",))


def saved(model: nn.Module, path: Path) -> Path:
    perturb(ll.attach(model, NARROW).targets.values())
    return ll.save(model, path)


@contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size`: a write fails half way, as on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write everywhere; act as another user meanwhile."""
    former = os.geteuid()
    if former == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(former)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = saved(tiny_llama(), tmp_path / "adapter.safetensors")
    old = path.read_bytes()
    model = tiny_llama()
    attached(model, "lora", r=4)
    with small_files_only(1000), pytest.raises(OSError, match="File too large"):
        ll.save(model, path)
    assert path.read_bytes() == old
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_an_unwritable_folder(tmp_path: Path) -> None:
    path = saved(tiny_llama(), tmp_path / "closed" / "adapter.safetensors")
    old = path.read_bytes()
    model = tiny_llama()
    attached(model, "lora")
    path.parent.chmod(0o555)
    try:
        with unprivileged(), pytest.raises(PermissionError):
            ll.save(model, path)
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == old and [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(bad: float, tmp_path: Path) -> None:
    path = saved(tiny_llama(), tmp_path / "adapter.safetensors")
    old = path.read_bytes()
    model = tiny_llama()
    att = ll.attach(model, NARROW, train_also=("norm.weight",))
    A = next(iter(att.targets.values())).A
    for tensor, name in ((A, r"layers\.0.*lora\.A"), (att.also["model.norm.weight"], "also")):
        kept = tensor.detach().clone()
        tensor.data.view(-1)[0] = bad
        with pytest.raises(ll.CheckpointError, match=f"{name}.* is not finite .*nothing was written"):
            ll.save(model, path)
        tensor.data.copy_(kept)
    assert path.read_bytes() == old and [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora")
    with pytest.raises(ll.CheckpointError, match="is a folder; give a file"):
        ll.save(model, tmp_path)
    (tmp_path / "plain").touch()
    with pytest.raises(OSError, match="plain"):
        ll.save(model, tmp_path / "plain" / "adapter.safetensors")


def test_only_our_own_stale_files_are_cleaned_up(tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora")
    gone = 4_194_305  # beyond the largest process id of Linux
    stale = tmp_path / f".a.safetensors.{gone}.0123abcd.tmp"
    others = [
        f".a.safetensors.{os.getpid()}.0123abcd.tmp",  # a save that is under way
        f".b.safetensors.{gone}.0123abcd.tmp",  # another file's
        ".a.safetensors.backup.tmp",
        ".a.safetensors.tmp",
        f".a.safetensors.{'9' * 30}.0123abcd.tmp",
        "a.safetensors.tmp",
    ]
    for name in [stale.name, *others]:
        (tmp_path / name).touch()
    ll.save(model, tmp_path / "a.safetensors")
    assert {found.name for found in tmp_path.iterdir()} == {"a.safetensors", *others}
