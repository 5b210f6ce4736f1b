"""Saves that fail leave what was there before, and nothing else."""

import os
import resource
import socket
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


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device", "socket"])
def test_a_device_or_pipe_is_not_replaced(kind: str, tmp_path: Path) -> None:
    model = tiny_llama()
    attached(model, "lora")
    path = tmp_path / "place"
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            server.bind(str(path))
        elif kind == "device":
            path = Path("/dev/null")
        else:
            path.symlink_to("/dev/null")
        before = os.lstat(path)
        with pytest.raises(ll.CheckpointError, match=r"is a (device|pipe|socket), which a file cannot replace"):
            ll.save(model, path)
        after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode) and list(tmp_path.iterdir()) in ([path], [])


def test_a_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    attached(model, "lora")
    assert ll.save(model, "~/x/a.safetensors") == tmp_path / "home" / "x" / "a.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert ll.load(tiny_llama(), "~/x/a.safetensors").targets
