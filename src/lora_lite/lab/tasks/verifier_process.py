"""The process in which reasoning-gym's verifiers read replies: run as a script by `verifiers`, never imported.

Some verifiers evaluate a reply as Python or as an expression, so this is where a reply could act. The script itself
reads no reply. For each generator it forks a worker that gives up what it can before it reads one:

- no code but literals and mathematics: what a verifier or sympy evaluates may name sympy's mathematical objects only,
  has no attributes, imports or functions of its own, and is refused before it runs;
- an audit hook, which nothing can take away again, allows a few events and refuses all others: files are opened for
  reading only, and only where Python's modules lie; no process, socket, signal or foreign function;
- limits of the system: no file grows, no process starts, memory and processor time are bounded; limits that a system
  lacks (memory on macOS) are left out;
- its working folder no longer exists, its environment is empty, its standard streams lead nowhere.

A worker that runs out of time, dies, or refused something is killed, and the next reply gets a fresh one.

One line of JSON in, one out. In: the generator, the module that registers it, its parameters, the entry, the answer and
the seconds that it may take; parameters and entry are pickles in base64, from the process that started this one. Out:
{"score": float} or {"failure": why there is none}. No pickle comes back.
"""

import base64
import importlib
import json
import math
import os
import pickle
import resource
import select
import signal
import sys
import tempfile
import time
from types import CodeType
from typing import Any, NoReturn

MEMORY = 2 * 1024**3  # bytes of address space; the modules alone take 0.2 GB
FILES = 64  # open at a time: modules that are imported late, and two pipes
SIZE = 512  # items of a dataset object; none of them is drawn here

# What running a verifier takes: reading modules, and running code that `_require_plain` has seen.
ALLOWED_EVENTS = {
    "array.__new__", "builtins.id", "code.__new__", "compile", "exec", "import", "marshal.load", "marshal.loads",
    "object.__getattr__", "object.__setattr__", "os.listdir", "os.scandir", "pickle.find_class", "resource.setrlimit",
    "sys._getframe", "sys._getframemodulename",
}  # fmt: skip
FORBIDDEN_MODULES = {
    "_cffi_backend", "_ctypes", "_posixsubprocess", "_socket", "cffi", "ctypes", "socket", "subprocess",
}  # fmt: skip
SYMPY_NAMES = compile("from sympy import *", "<string>", "exec")  # what sympy's parser runs before it reads anything
CODE_WRITER = os.path.join("polys", "monomials.py")  # of sympy: makes code from a number of variables, from no text
MATHEMATICS = {"abs", "cbrt", "real_root", "root", "sqrt"}  # functions of sympy beside its classes


class RefusedError(BaseException):
    """What was being evaluated may not do this. Not an Exception: verifiers catch those and go on."""


class Guard:
    """The audit hook of a worker. refused: the first thing that was refused, "" if nothing was."""

    def __init__(self) -> None:
        import reasoning_gym
        import sympy

        self.refused = ""
        self.sympy = sympy
        self.gym_folder, self.sympy_folder = (os.path.dirname(str(m.__file__)) + os.sep for m in (reasoning_gym, sympy))
        places = (*sys.path, sys.prefix, sys.base_prefix)
        self.readable = tuple(os.path.realpath(place) + os.sep for place in places if place)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "exec":
            self._require_plain(args[0], sys._getframe(1).f_code.co_filename)
        elif event == "import":
            if args[0].partition(".")[0] in FORBIDDEN_MODULES:
                self._refuse(f"import {args[0]}")
        elif event == "open":
            self._require_module(*args)
        elif event not in ALLOWED_EVENTS:
            self._refuse(event)

    def _require_plain(self, code: CodeType, caller: str) -> None:
        """Refuse code from a verifier or sympy unless it is literals, operators and sympy's mathematical objects."""
        if not caller.startswith((self.gym_folder, self.sympy_folder)):
            return  # modules and classes being made
        if caller == self.sympy_folder + CODE_WRITER:
            return
        if (code.co_code, code.co_names) == (SYMPY_NAMES.co_code, SYMPY_NAMES.co_names):  # flags are the caller's
            return
        if any(isinstance(constant, CodeType) for constant in code.co_consts):
            self._refuse("code with functions of its own")
        for name in code.co_names:
            if not (caller.startswith(self.sympy_folder) and self._is_mathematics(name)):
                self._refuse(f"code that names {name!r}")

    def _is_mathematics(self, name: str) -> bool:
        """Whether sympy's parser may name this: variables of one letter, sympy's own classes and constants."""
        found = getattr(self.sympy, name, None)
        own = issubclass(found, self.sympy.Basic) if isinstance(found, type) else isinstance(found, self.sympy.Basic)
        return own or name in MATHEMATICS or (len(name) == 1 and name.isalpha())

    def _require_module(self, path: Any, mode: Any, flags: Any) -> None:
        """Refuse to open anything but a file of Python's own places, for reading."""
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if not isinstance(path, str) or (isinstance(flags, int) and flags & writes):
            self._refuse("open for writing")
        if not os.path.realpath(path).startswith(self.readable):
            self._refuse(f"open {path!r}")

    def _refuse(self, what: str) -> NoReturn:
        self.refused = self.refused or what
        raise RefusedError(what)


def limit(what: str, value: int) -> None:
    """Lower a limit of the system for good, where the system has it."""
    kind = getattr(resource, what, None)
    if kind is None:
        return
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):  # macOS has the name RLIMIT_AS, and refuses to set it
        return


def lock_up(*keep: int) -> Guard:
    """Give up files, processes, memory and code. keep: the file descriptors that stay open."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)  # nothing can be made in a folder that is gone
    os.environ.clear()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    kept = sorted(keep)
    for low, high in zip((2, *kept), (*kept, os.sysconf("SC_OPEN_MAX")), strict=True):
        os.closerange(low + 1, high)
    guard = Guard()
    limits = {"FSIZE": 0, "NPROC": 0, "CORE": 0, "NOFILE": FILES, "AS": MEMORY}
    for what, value in limits.items():
        limit(f"RLIMIT_{what}", value)
    sys.addaudithook(guard)
    return guard


def bound_processor_time(seconds: float) -> None:
    """End this process after `seconds` more of processor time, should nobody be left to do it."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds) + 1, hard))


def score(dataset: Any, entry: Any, answer: str, guard: Guard) -> dict[str, Any]:
    """The verifier's score, or why there is none."""
    failure = ""
    try:
        value = float(dataset.score_answer(answer, entry))
    except (Exception, RefusedError) as error:  # a verifier is foreign code: whatever it raises is no score
        value, failure = math.nan, f"{type(error).__name__}: {error}"[:200]
    if guard.refused:
        return {"failure": f"refused: {guard.refused}"}
    if not math.isfinite(value):
        return {"failure": failure or f"a score of {value}"}
    return {"score": value}


def work(dataset: Any, requests: int, replies: int) -> None:
    """What a worker does until its pipe ends: score what comes, and write one line for each."""
    with os.fdopen(requests, "rb") as lines, os.fdopen(replies, "wb") as out:
        guard = lock_up(requests, replies)
        for line in lines:
            request = json.loads(line)
            bound_processor_time(request["seconds"])
            entry = unpickled(request["entry"])
            out.write(json.dumps(score(dataset, entry, request["answer"], guard)).encode() + b"\n")
            out.flush()


def unpickled(text: str) -> Any:
    """An object that the starting process sent; nothing of a reply comes this way."""
    return pickle.loads(base64.b64decode(text))


class Worker:
    """A forked process that scores replies for one dataset object."""

    def __init__(self, dataset: Any) -> None:
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                work(dataset, requests, replies)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)

    def ask(self, line: bytes, seconds: float) -> dict[str, Any]:
        """What the worker answers within the time."""
        died = {"failure": "the verifier's process died"}
        deadline, answer = time.monotonic() + seconds, b""
        try:
            while line:
                line = line[os.write(self.requests, line) :]
        except BrokenPipeError:
            return died
        while not answer.endswith(b"\n"):
            if not select.select([self.replies], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return {"failure": f"no score after {seconds:g} s"}
            if not (part := os.read(self.replies, 65536)):
                return died
            answer += part
        return json.loads(answer)

    def end(self) -> None:
        """Kill the process, and close its pipes."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.requests)
        os.close(self.replies)


def main() -> None:
    """Answer requests until there are no more. Arguments: where modules are found, as JSON."""
    sys.path[:] = json.loads(sys.argv[1])
    factory = importlib.import_module("reasoning_gym.factory")
    importlib.import_module("sympy")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # generators print
    workers: dict[str, Worker] = {}
    datasets: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        key = json.dumps([request["generator"], request["parameters"]])
        if key not in datasets:
            importlib.import_module(request["module"])
            parameters = unpickled(request["parameters"])
            datasets[key] = factory.create_dataset(request["generator"], seed=0, size=SIZE, **parameters)
        if key not in workers:
            workers[key] = Worker(datasets[key])
        answer = workers[key].ask(line, request["seconds"])
        if "failure" in answer:
            workers.pop(key).end()
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    main()
