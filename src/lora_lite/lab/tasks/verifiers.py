"""Scores by reasoning-gym's own verifiers, which read replies in a locked-down process of their own.

A reply is data, but several verifiers evaluate it. So none of them ever sees one here: `verifier_process`, started at
the first reply and kept, scores them all under limits of time and memory, without files, processes or network.
"""

import atexit
import base64
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from reasoning_gym.factory import DATASETS

from lora_lite.lab.tasks import verifier_process
from lora_lite.lab.tasks.task import VerifierError

SECONDS = 10.0  # that a verifier may take for a reply
# What a Python may need to find its own libraries; nothing else of the environment is passed on.
_LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class VerifierProcess:
    """The process, started when it is first needed, and again when it was lost or the caller has been forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def score(self, generator: str, parameters: Mapping[str, Any], entry: Any, answer: str) -> float:
        """The score that a generator's verifier gives an answer.

        Raises VerifierError if it gives none: it raises, gives no finite number, runs out of time or memory, or does
        what the process refuses.
        """
        request = {
            "generator": generator, "module": DATASETS[generator][0].__module__, "parameters": _pickled(parameters),
            "entry": _pickled(entry), "answer": answer, "seconds": SECONDS,
        }  # fmt: skip
        answered = self._ask(json.dumps(request).encode() + b"\n")
        if "score" not in answered:
            raise VerifierError(f"the verifier of {generator!r} gave no score: {answered['failure']}")
        return float(answered["score"])

    def _ask(self, line: bytes) -> dict[str, Any]:
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            answer = b""
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            finally:
                if not answer.endswith(b"\n"):  # it died, or we were interrupted before its answer came
                    self.end()
        return json.loads(answer) if answer else {"failure": "the process of verifiers died"}

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.end()
            command = [sys.executable, "-I", "-B", "-W", "ignore", verifier_process.__file__]
            environment = {name: os.environ[name] for name in _LIBRARIES if name in os.environ}
            self._process = subprocess.Popen(
                [*command, json.dumps([place for place in sys.path if place])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for us
            )  # fmt: skip
            self._owner = os.getpid()
        return self._process

    def end(self) -> None:
        """End the process; the next reply starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.communicate()


def _pickled(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


VERIFIERS = VerifierProcess()
atexit.register(VERIFIERS.end)
