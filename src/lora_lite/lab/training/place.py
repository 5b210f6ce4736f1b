"""The folder of a training run: whether a run may use it, and that one does at a time."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_lite.lab.errors import RunError
from lora_lite.lab.folders import make_folder, unwritable
from lora_lite.lab.locks import hold
from lora_lite.lab.training.checkpoints import checkpoints_in


@dataclass(frozen=True)
class Place:
    """Where a run writes. resume: go on from the checkpoints there. overwrite: what is there may be given up."""

    out: Path
    resume: bool
    overwrite: bool

    @property
    def adapter(self) -> Path:
        return self.out / "adapter.safetensors"

    @property
    def result(self) -> Path:
        return self.out / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def require_fit(self) -> None:
        """Raise `RunError` where nothing is there to resume, or an earlier run would be lost."""
        try:
            there = self.out.exists()
        except OSError as error:  # a name too long, or a folder above it that may not be read
            raise unwritable(self.out, error) from error
        if there and not self.out.is_dir():
            raise RunError(f"--out {self.out} is a file: give a folder, existing or new")
        finished, stopped = self.result.exists(), bool(checkpoints_in(self.checkpoints))
        if self.resume and finished:
            raise RunError(f"{self.out} holds a finished run ({self.result}): there is nothing to resume")
        if self.resume and not stopped:
            raise RunError(
                f"{self.checkpoints} holds no checkpoint: there is nothing to resume; look at --out, or leave --resume "
                "out to start at the beginning"
            )
        if self.resume or self.overwrite:
            return
        if finished or self.adapter.exists():
            what = "a finished run" if finished else "an adapter"
            raise RunError(f"{self.out} holds {what}: give another --out, or --overwrite to give it up")
        if stopped:
            raise RunError(
                f"{self.checkpoints} holds checkpoints: give --resume to go on, or another --out, or --overwrite "
                "to give them up"
            )

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Keep other runs out. Of several processes that train together, the first does so for all.

        Raises `RunError` if another run is at it, or was meanwhile.
        """
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        make_folder(self.out)
        with hold(self.out / ".lock") as holder:
            if holder:
                raise RunError(f"another run is writing to {self.out} ({holder}): wait for it, or give another --out")
            self.require_fit()
            yield

    def clear(self) -> None:
        """Remove what is to be overwritten."""
        if self.overwrite:
            self.result.unlink(missing_ok=True)
            self.adapter.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
