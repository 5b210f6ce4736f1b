"""The writer of files: whole or not at all, whoever else writes to the same place, on whatever file system."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

import lora_lite as ll
from lora_lite.files import atomic
from lora_lite.files.atomic import write_atomically

GONE = 4_194_305  # beyond the largest process id of Linux
DAY = 24 * 3600


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def temporary(where: Path, kernel: str | None = None, age: float = 0.0) -> Path:
    """A temporary file as a killed process leaves it; kernel: of another machine."""
    path = where.parent / f".{where.name}.{kernel or atomic._kernel()}.0123456789abcdef.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    where = tmp_path / "a.bin"
    temporary(where)
    write_atomically(where, b"new")
    assert names(tmp_path) == {"a.bin"} and where.read_bytes() == b"new"


@pytest.mark.parametrize("age", [0.0, 0.9 * DAY, 1.1 * DAY])
def test_another_machines_temporary_file_is_removed_after_a_day_alone(age: float, tmp_path: Path) -> None:
    where = tmp_path / "a.bin"
    here, before = temporary(where, "00000000", age), temporary(where, str(GONE), age)  # the latter: named by a process
    write_atomically(where, b"new")
    assert names(tmp_path) == {"a.bin"} | ({here.name, before.name} if age < DAY else set())


@pytest.mark.parametrize("age", [0.0, 30.0 * DAY])
def test_a_file_that_is_being_written_to_is_never_removed(age: float, tmp_path: Path) -> None:
    where = tmp_path / "a.bin"
    live = temporary(where, age=age)
    with open(live, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        write_atomically(where, b"new")
        assert names(tmp_path) == {"a.bin", live.name}
    write_atomically(where, b"new")
    assert names(tmp_path) == {"a.bin"}


def test_files_that_are_not_ours_stay(tmp_path: Path) -> None:
    kernel = atomic._kernel()
    others = {f".b.bin.{kernel}.0123456789abcdef.tmp", ".a.bin.backup.tmp", ".a.bin.tmp", "a.bin.tmp", ".a.bin.x.1.tmp"}
    for name in others:
        (tmp_path / name).touch()
    pipe = tmp_path / f".a.bin.{kernel}.0123456789abcdee.tmp"
    os.mkfifo(pipe)
    write_atomically(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == {"a.bin", pipe.name, *others}


WRITER = """
    import sys
    from pathlib import Path
    from lora_lite.files.atomic import write_atomically
    where, letter = Path(sys.argv[1]), sys.argv[2].encode()
    for _ in range(60):
        write_atomically(where, letter * 20_000)
        found = where.read_bytes()
        assert len(found) == 20_000 and found == found[:1] * 20_000, found[:10]
"""


def namespaces() -> list[str]:
    """A command that gives its child process ids of its own, as a container does; empty where that is not allowed."""
    command = ["unshare", "--pid", "--fork"]
    allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


def test_writers_in_containers_do_not_disturb_each_other(tmp_path: Path) -> None:
    source = tmp_path / "writer.py"
    source.write_text(textwrap.dedent(WRITER))
    where = tmp_path / "shared" / "a.bin"
    running = [
        subprocess.Popen([*namespaces(), sys.executable, str(source), str(where), letter], stderr=subprocess.PIPE)
        for letter in "abcd"
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * 4, errors
    assert names(where.parent) == {"a.bin"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_an_existing_files_mode_is_kept(mode: int, tmp_path: Path) -> None:
    where = tmp_path / "a.bin"
    where.touch()
    where.chmod(mode)
    write_atomically(where, b"new")
    assert stat.S_IMODE(where.stat().st_mode) == mode and where.read_bytes() == b"new"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_files_mode_follows_the_umask(mask: int, tmp_path: Path) -> None:
    former = os.umask(mask)
    try:
        write_atomically(tmp_path / "a.bin", b"new")
        (tmp_path / "plain").write_bytes(b"new")
    finally:
        os.umask(former)
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link, loop = tmp_path / "there" / "a.bin", tmp_path / "link", tmp_path / "loop"
    link.symlink_to(target)
    for data in (b"through a dangling link", b"new"):
        write_atomically(link, data)
        assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == data
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(loop, b"new")
    assert names(tmp_path) == {"there", "link", "loop"} and names(target.parent) == {"a.bin"}


@pytest.mark.parametrize("letter", ["n", "é"])
def test_a_name_as_long_as_the_system_takes(letter: str, tmp_path: Path) -> None:
    where = tmp_path / (letter * (255 // len(letter.encode())))
    temporary_of_it = tmp_path / f"{atomic._prefix(where)}{atomic._kernel()}.0123456789abcdef.tmp"
    temporary_of_it.touch()
    write_atomically(where, b"new")
    assert names(tmp_path) == {where.name}


def refusing(code: int) -> Any:
    def refuse(*arguments: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_takes_new_files_and_refuses_old_ones(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refusing(code))  # no such file system can be mounted in a test
    where = tmp_path / "a.bin"
    write_atomically(where, b"first", once=True)
    with pytest.raises(FileExistsError):
        write_atomically(where, b"second", once=True)
    assert where.read_bytes() == b"first" and names(tmp_path) == {"a.bin"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_system_that_does_not_sync_folders(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            write_atomically(tmp_path / "a.bin", b"new")
    else:
        write_atomically(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_file_that_cannot_be_synced_is_an_error(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "a.bin"
    write_atomically(where, b"old")
    monkeypatch.setattr(os, "fsync", refusing(code))
    with pytest.raises(OSError, match=where.name):
        write_atomically(where, b"new")
    assert where.read_bytes() == b"old" and names(tmp_path) == {"a.bin"}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ll.LoraLiteError, match="is a folder, which a file cannot replace"):
        write_atomically(tmp_path, b"new")
    with pytest.raises(OSError, match="a device"):
        write_atomically(Path("/dev/null"), b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not names(tmp_path)
