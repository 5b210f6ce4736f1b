"""Checkpoints of training: a folder for each, which appears under its name only when it is whole and on the disk.

One that is damaged all the same (a disk may lose what it said it had) is recognised by its digests, and passed over.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel

import lora_lite as ll
from lora_lite.files.atomic import sync_folder, write_atomically
from lora_lite.lab import identity
from lora_lite.lab.digests import file_digest
from lora_lite.lab.terminal import note
from lora_lite.lab.training.data import Encoded
from lora_lite.lab.training.progress import Progress, TrainConfig

ADAPTER, OPTIMIZER, PROGRESS = "adapter.safetensors", "optimizer.safetensors", "progress.json"


class CheckpointWriteError(ll.LoraLiteError, OSError):
    """A checkpoint cannot be written: the disk is full, say."""


class CheckpointRecord(TypedDict):
    """What `progress.json` holds: the fields of `Progress`, and what shows that it belongs here and is whole.

    fingerprint: of the run. digests: SHA-256 of the other files. digest: of all else in this record.
    """

    losses: list[float]
    tokens: int
    answer_tokens: int
    seconds: float
    rate: float
    grad_norm: float
    fingerprint: str
    digests: dict[str, str]
    digest: str


def fingerprint(cfg: TrainConfig, items: Sequence[Encoded]) -> str:
    """A hash of what a run must share with the checkpoint that it goes on from."""
    settings = identity.counted(dataclasses.asdict(cfg), identity.TRAINING)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for item in items:
        digest.update(repr((item.prompt, item.answer)).encode())
    return digest.hexdigest()


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, by rising steps."""
    folders = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def last_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps in `folder`. A damaged one is removed, and said to be."""
    for path in reversed(checkpoints_in(folder)):
        if (damage := find_damage(path)) is None:
            return path
        note(f"the checkpoint {path} is damaged ({damage}): it is discarded, and training goes on from before it")
        shutil.rmtree(path, ignore_errors=True)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are as they were written."""
    try:
        record = json.loads((checkpoint / PROGRESS).read_bytes())
        digests = {ADAPTER: record["digests"][ADAPTER], OPTIMIZER: record["digests"][OPTIMIZER]}
        whole = record["digest"] == record_digest(record)
        changed = [name for name, digest in digests.items() if file_digest(checkpoint / name) != digest]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{changed[0]} has changed" if changed else None if whole else f"{PROGRESS} has changed"


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of all that a record holds, but for this digest."""
    return hashlib.sha256(
        json.dumps({key: value for key, value in record.items() if key != "digest"}, sort_keys=True).encode()
    ).hexdigest()


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    name: str,
    optimizer: torch.optim.Optimizer,
    progress: "Progress",
    cfg: "TrainConfig",
    items: Sequence[Encoded],
) -> Path:
    """Write adapter, optimiser and progress; older checkpoints go once the new one is there.

    Raises CheckpointWriteError if that fails: what was there before is as it was.
    """
    target = folder / f"step-{progress.step}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        ll.save(model, temporary / ADAPTER, name=name)
        write_atomically(temporary / OPTIMIZER, to_bytes(optimizer_tensors(optimizer)))
        digests = {name: file_digest(temporary / name) for name in (ADAPTER, OPTIMIZER)}
        record = CheckpointRecord(**vars(progress), fingerprint=fingerprint(cfg, items), digests=digests, digest="")
        record["digest"] = record_digest(record)
        write_atomically(temporary / PROGRESS, json.dumps(record).encode())
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        before = [path.name for path in checkpoints_in(folder)]
        left = f"{before[-1]} is still there" if before else "there is no earlier one"
        raise CheckpointWriteError(
            error.errno,
            f"the checkpoint of step {progress.step} cannot be written ({error.strerror}); {left}; make room, and "
            "start again",
            str(folder),
        ) from error
    for older in folder.glob("step-*"):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)
    return target


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments, and the state of the random generators."""
    states = optimizer.state_dict()["state"]
    tensors = {f"{index}.{key}": value for index, state in states.items() for key, value in state.items()}
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["cuda_rng"] = torch.cuda.get_rng_state()
    return {key: value.contiguous() for key, value in tensors.items()}


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Set the optimiser's moments and the random generators to those of a checkpoint."""
    tensors = from_bytes((checkpoint / OPTIMIZER).read_bytes())
    torch.set_rng_state(tensors.pop("rng"))
    if (cuda := tensors.pop("cuda_rng", None)) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, field_name = key.partition(".")
        state.setdefault(int(index), {})[field_name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_progress(checkpoint: Path) -> tuple[Progress, str]:
    """What a checkpoint says of the run so far, and the fingerprint of that run."""
    record: CheckpointRecord = json.loads((checkpoint / PROGRESS).read_bytes())
    fields = [each.name for each in dataclasses.fields(Progress)]
    return Progress(**{name: record[name] for name in fields}), record["fingerprint"]
