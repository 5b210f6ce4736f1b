"""Folders that runs write to."""

from pathlib import Path

from lora_lite.lab.errors import RunError


def unwritable(path: Path, error: OSError) -> RunError:
    """The error for a place that cannot be written to, with the system's reason."""
    reason = error.strerror or str(error)
    return RunError(f"cannot write to {path} ({reason}): give another --out, a folder that you may make and write to")


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises RunError, with the path and the reason, where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
