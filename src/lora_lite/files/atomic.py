"""The one writer of files, for the core and the lab: at any moment a file holds its old content or the new one, whole.

The new content goes to a temporary file beside the old one, which then takes its place. A process that was killed
leaves its temporary file behind; the next write to the same place removes it, and never one that is being written to.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import stat
import time
from pathlib import Path

from lora_lite.errors import NotAFileError

FOREIGN_SECONDS = 24 * 3600  # how old another machine's temporary file must be before it is taken for abandoned
LONGEST_NAME = 180  # bytes of a file's name that its temporary file repeats: most systems allow 255 in all
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # exFAT, SMB, FUSE
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as a user means it: "~" is the home folder, as in a shell."""
    return Path(os.path.expanduser(path))


def write_atomically(where: Path, data: bytes, once: bool = False) -> None:
    """Replace the file `where` by `data`: at any moment it holds the old content or the new, even after a crash.

    Missing folders are made. A link stays, and what it points to is replaced. An existing file's mode is kept, and its
    owner where that is allowed; a new file's mode follows the umask. Several processes may write to one place, also
    from containers and machines that share the folder: the last one wins.

    Args:
        where: the file. data: its content.
        once: leave a file that is there already, and raise FileExistsError.

    Raises:
        NotAFileError: a folder, device, pipe or socket is there. OSError: what the system says, with the file's name.
    """
    where = Path(os.path.realpath(expanded(where)))
    former = file_status(where)
    where.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(where)
    temporary, handle = _temporary(where, 0o666 if former is None else stat.S_IMODE(former.st_mode) & 0o666)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            if former is not None:
                _keep_status(handle, former)
            os.fsync(handle)
            (_appear if once else os.replace)(temporary, where)
    except OSError as error:
        if error.filename is None:  # of a write: a full disk, say
            raise OSError(error.errno, error.strerror, str(where)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(where.parent)


def file_status(where: Path) -> os.stat_result | None:
    """The status of a file, None where there is nothing. Raises NotAFileError for what is no regular file."""
    try:
        status = os.stat(where)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise NotAFileError(f"{where} is a {kind}, which a file cannot replace; give the path of a file")
    return status


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk. Systems that know no such thing, or let it not be read, are left be."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written to, but not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _temporary(where: Path, mode: int) -> tuple[Path, int]:
    """A new file beside `where`, locked for as long as it is open, which shows others that it is being written to."""
    while True:
        path = where.parent / f"{_prefix(where)}{_kernel()}.{secrets.token_hex(8)}.tmp"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        with contextlib.suppress(OSError):  # a file system without locks: nobody can take it for abandoned either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # removed as abandoned in the moment before it was locked


def _prefix(where: Path) -> str:
    long = len(os.fsencode(where.name)) > LONGEST_NAME
    return f".{hashlib.sha256(os.fsencode(where.name)).hexdigest()[:32] if long else where.name}."


@functools.cache
def _kernel() -> str:
    """Which running system this is: containers on one machine share it, machines that share a folder do not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = secrets.token_bytes(16)
    return hashlib.sha256(boot).hexdigest()[:8]


def _remove_abandoned(where: Path) -> None:
    """Remove what killed processes left of their writes to `where`."""
    pattern = re.compile(rf"{re.escape(_prefix(where))}([0-9a-f]{{1,9}})\.[0-9a-f]{{8,16}}\.tmp")
    try:
        with os.scandir(where.parent) as entries:
            matches = [(entry, pattern.fullmatch(entry.name)) for entry in entries]
    except PermissionError:  # a folder that may be written to, but not read
        return
    for entry, name in matches:
        if name is not None and entry.is_file(follow_symlinks=False):
            _remove_unlocked(entry.path, 0 if name[1] == _kernel() else FOREIGN_SECONDS)


def _remove_unlocked(path: str, age: float) -> None:
    """Remove a temporary file that nobody has locked, if it is `age` seconds old: locks of other machines may not show
    here."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or another user's
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(handle).st_mtime >= age:
            Path(path).unlink(missing_ok=True)
    except OSError:  # being written to, or not ours to remove
        return
    finally:
        os.close(handle)


def _keep_status(handle: int, former: os.stat_result) -> None:
    """Give an open file the mode of the one that it replaces, and the owner where that is allowed."""
    ours = os.fstat(handle)
    if (ours.st_uid, ours.st_gid) != (former.st_uid, former.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(handle, former.st_uid, former.st_gid)
    mode = stat.S_IMODE(former.st_mode)
    if stat.S_IMODE(os.fstat(handle).st_mode) != mode:
        os.fchmod(handle, mode)


def _appear(temporary: Path, where: Path) -> None:
    """Give a file a name that must be free: unlike a rename, a hard link fails where the name is taken."""
    try:
        os.link(temporary, where)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        _appear_without_links(temporary, where)


def _appear_without_links(temporary: Path, where: Path) -> None:
    """`_appear` on file systems without hard links: looks and renames, with the folder locked against its like."""
    folder = os.open(where.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks on folders either
            fcntl.flock(folder, fcntl.LOCK_EX)
        if os.path.lexists(where):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(where))
        os.replace(temporary, where)
    finally:
        os.close(folder)
