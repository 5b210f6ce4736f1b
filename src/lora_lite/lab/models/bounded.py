"""Foreign code that may never end is tried in a forked process first, with limits on its time and memory.

Made for chat templates: jinja's sandbox keeps them from files and from Python, and bounds a range, but neither ranges
within ranges nor texts that grow. A fork costs milliseconds, and the child does nothing but what it is given.
"""

import contextlib
import os
import resource
import select
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 3.0  # of processor time
PATIENCE = 20.0  # seconds on the clock, on a machine that has much else to do
MEMORY = 2 * 1024**3  # bytes of address space beyond what this process has; unbounded where the system does not say
TOO_DEEP, TOO_LARGE = 3, 4  # exit codes
WHY = {TOO_DEEP: "it is nested too deeply", TOO_LARGE: f"it takes more than {MEMORY / 1e9:.0f} GB of memory"}


def why_unbounded(work: Callable[[], Any], seconds: float = SECONDS) -> str:
    """Why `work` cannot be done here, in words: it takes too long, too much memory, or is nested too deeply; else "".

    seconds: of processor time that it may take. What it raises otherwise is no reason, and what it gives is lost: it
    runs in a process of its own.
    """
    there, here = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child needs none of them
        child = os.fork()
    if child == 0:
        _try(work, seconds)
    os.close(here)  # the child's end: when the child ends, reading ends
    ended = bool(select.select([there], [], [], max(PATIENCE, seconds))[0])
    os.close(there)
    if not ended:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not ended or code == -signal.SIGXCPU:
        return f"it takes longer than {seconds:g} s"
    return WHY.get(code, f"the process that tried it was ended by signal {-code}" if code < 0 else "")


def _try(work: Callable[[], Any], seconds: float) -> None:
    """What the child does; it never returns."""
    code = 0
    try:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _limit(resource.RLIMIT_CPU, int(used + seconds) + 1)
        _limit(resource.RLIMIT_CORE, 0)
        with contextlib.suppress(OSError, ValueError):  # no /proc
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)
        work()
    except RecursionError:
        code = TOO_DEEP
    except MemoryError:
        code = TOO_LARGE
    finally:
        os._exit(code)  # whatever else it raised: nothing of this process may go on


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS refuses some
        resource.setrlimit(kind, (value, hard))
