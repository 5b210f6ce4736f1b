"""Locks between processes, which the system frees when their process ends, however it ends."""

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from lora_lite.lab.folders import unwritable

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[str]:
    """Hold the lock of a file, made where it is missing: "" is given. Another process has it: who that is, in words.

    A file system without locks keeps nobody apart: "" as well.
    """
    try:
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise unwritable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or "another process"
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield ""
