"""The ledger: a folder of results. Each run is one JSON file, named by the hash of its configuration, written once.

Several processes may share a folder: a run is claimed by a lock that the system frees when its process ends, however
it ends. Nothing is ever half there: files appear under their names only when they are whole.
"""

import contextlib
import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lora_lite.errors import LoraLiteError
from lora_lite.files.atomic import expanded, write_atomically
from lora_lite.lab.folders import make_folder
from lora_lite.lab.locks import hold
from lora_lite.lab.studies.records import DONE, FAILED, FIGURES, JobConfig, RunRecord
from lora_lite.lab.studies.shapes import lacking

FORMAT = 1


class LedgerError(LoraLiteError, RuntimeError):
    """The folder of results cannot be used, or a file in it is damaged; the message says which, and how to fix it."""


def run_id(config: Any) -> str:
    """The name of a run: 16 hex digits of the SHA-256 of its configuration as canonical JSON."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:16]


def digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of all that a record holds, but for this digest: it shows a change by hand, or damage."""
    return hashlib.sha256(
        canonical({key: value for key, value in record.items() if key != "digest"}).encode()
    ).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and without blanks; refuses NaN, which no reader of JSON need know."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Ledger:
    """The results in a folder.

    Layout: `runs/ID.json`, a run; `data/FINGERPRINT.json`, the items that runs refer to; `study.json`, what is asked
    for; `.work/`, locks and checkpoints of what is going on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = expanded(folder)
        self.runs, self.data, self.work = folder / "runs", folder / "data", folder / ".work"

    def read(self, run: str) -> RunRecord | None:
        """The record of a run; None if there is none yet. Raises `LedgerError` if the file is damaged."""
        path = self.runs / f"{run}.json"
        if not path.exists():
            return None
        record = read_json(path)
        whole = isinstance(record, dict) and digest(record) == record.get("digest")
        if not whole or record.get("id") != run or run_id(record.get("config")) != run or lacks(record):
            raise LedgerError(
                f"{path} does not hold the run that it is named after: it was changed by hand, or is damaged; remove "
                "it, and the run is made again"
            )
        return cast(RunRecord, record)

    def figures(self, run: str) -> RunRecord | None:
        """The record of a run with all the figures that a finished one of its kind has; None if there is none yet.

        Raises `LedgerError` if the file is damaged, or lacks a figure.
        """
        record = self.read(run)
        shapes = FIGURES.get(record["config"].get("kind", ""), ()) if record and record["status"] == DONE else ()
        if absent := [key for shape in shapes for key in lacking(record, shape)]:
            raise LedgerError(
                f"{self.runs / run}.json lacks {', '.join(absent)}, or holds another type there: another version of "
                "the lab wrote it; remove it, and the run is made again"
            )
        return record

    def records(self) -> Iterator[RunRecord]:
        """Every run in the folder, in the order of their names."""
        for path in sorted(self.runs.glob("*.json")):
            record = self.read(path.stem)
            if record is not None:  # removed since the folder was listed
                yield record

    def write(self, config: JobConfig, status: str, figures: Mapping[str, object]) -> str:
        """Write a run, once and for all; its name. Raises `LedgerError` if it is there already.

        figures: what `RunRecord` has beyond the name, the configuration and the status.
        """
        run = run_id(config)
        record = {"format": FORMAT, "id": run, "status": status, "config": config, **figures}
        record["digest"] = digest(record)
        try:
            publish(self.runs / f"{run}.json", record, once=True)
        except FileExistsError as error:
            raise LedgerError(f"{self.runs / run}.json is there already, and a run is never overwritten") from error
        return run

    def forget_failures(self) -> int:
        """Remove the failed runs, so that they are tried again; how many there were."""
        failed = [record["id"] for record in self.records() if record["status"] == FAILED]
        for run in failed:
            (self.runs / f"{run}.json").unlink(missing_ok=True)
        return len(failed)

    @contextlib.contextmanager
    def claim(self, run: str) -> Iterator[bool]:
        """Whether this process may make the run: False if another is at it, or has made it in the meantime."""
        make_folder(self.work)
        with hold(self.work / f"{run}.lock") as holder:
            yield not holder and self.read(run) is None

    def scratch(self, run: str) -> Path:
        """A folder for the checkpoints of a run that is going on."""
        return self.work / run

    def tidy(self, run: str) -> None:
        """Remove what a finished run left in the work folder (its lock stays: others may be waiting at it)."""
        shutil.rmtree(self.scratch(run), ignore_errors=True)

    def tsv(self) -> str:
        """All runs as tab-separated lines: settings and single figures, a column each, sorted by name."""
        rows = [dict(flatten(record)) for record in self.records()]
        columns = sorted({key for row in rows for key in row})
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The single values in nested mappings, by dotted path. Lists are left out, but for short ones of settings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        if path.startswith("config.methods"):
            yield path, canonical(value)
    else:
        yield path, value


def lacks(record: Mapping[str, Any]) -> bool:
    """Whether a record lacks what every run writes: a configuration, a status and, of a failure, the reason."""
    if not isinstance(record.get("config"), dict) or record.get("status") not in (DONE, FAILED):
        return True
    return record["status"] == FAILED and not isinstance(record.get("reason"), str)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `LedgerError` if it is not there or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise LedgerError(
            f"{path} is not there: {path.parent} holds no results (`lora-lite bench` and `lora-lite study` make them)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise LedgerError(f"{path} cannot be read ({error}): remove it, and the same bench makes it again") from error


def publish(path: Path, value: Any, once: bool = False) -> None:
    """Write JSON so that the file is there whole or not at all. once: raises FileExistsError if it is there."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, text.encode(), once)
