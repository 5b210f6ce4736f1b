"""What a run is known by: which settings and data count into its identity, and why the others do not.

A job of a study is named by the hash of all that counts (`studies.plan.job_config`), so that a study finds what it has
done, and can grow. A run of `lora-lite train` is resumed, or reported again, only where all that counts is the same.
"""

from collections.abc import Mapping
from typing import Any

BASE, TUNE, SEED, COST = KINDS = ("base", "tune", "seed", "cost")  # of the jobs of a study
TRAINED, MEASURED = (TUNE, SEED), (BASE, SEED)

# Part of a job's configuration -> the kinds of job whose result depends on it.
JOB: Mapping[str, tuple[str, ...]] = {
    "kind": KINDS,
    "model": KINDS,
    "quantization": KINDS,
    "dtype": KINDS,  # the one that "auto" stands for here
    "device": KINDS,
    "task": (BASE, *TRAINED),
    "max_length": (BASE, *TRAINED),
    "max_new_tokens": MEASURED,
    "methods": (*TRAINED, COST),  # all their settings, the seed of their initial values among them
    "calibration_batches": (*TRAINED, COST),  # where a method needs data, and it is not the default
    "training": TRAINED,
}

# Fingerprint -> the kinds of job whose result depends on what it is of.
DATA: Mapping[str, tuple[str, ...]] = {
    "base": KINDS,
    "train": TRAINED,
    "validation": (BASE, *TRAINED),
    "test": MEASURED,
    "other": MEASURED,
    "general": MEASURED,
}

# What does not count by itself, and why.
STUDY: Mapping[str, str] = {
    "name": "a label",
    "about": "a sentence for readers",
    "baseline": "which arms are compared is decided after the runs",
    "trust_remote_code": "a permission: what the code makes of the base shows in the base's fingerprint",
    "train_examples": "counts as the fingerprint of the examples drawn",
    "validation_examples": "counts as the fingerprint of the examples drawn",
    "test_examples": "counts as the fingerprint of the items drawn",
    "seeds": "how many jobs there are; each counts its own seed",
    "rates": "how many jobs there are; each counts its own rate",
    "rate_factor": "which jobs there are; each counts its own rate",
    "rate_ratio": "which jobs there are; each counts its own rate",
    "target_names": "counts as a setting of the methods",
    "target_roles": "counts as a setting of the methods",
    "layers": "counts as a setting of the methods",
    "general_text": "counts as the fingerprint of its pieces",
    "general_windows": "counts as the fingerprint of its pieces",
    "window_tokens": "counts as the fingerprint of its pieces",
    "other_task": "counts as the fingerprint of its examples",
    "other_examples": "counts as the fingerprint of its examples",
    "costs": "whether there are jobs that measure them",
    "arms_as_run": "the settings and rates that jobs count, written out",
}
TRAINING: Mapping[str, str] = {"save_every": "how often checkpoints are written changes no step"}
RUN: Mapping[str, str] = {
    "out": "where it is written",
    "resume": "a resumed run ends with the bits of one that was not stopped",
    "overwrite": "what becomes of an earlier run",
    "device": "a run may go on elsewhere",
    "report_to": "who watches",
    "probe": "a probe is no run",
}


def counted(settings: Mapping[str, Any], uncounted: Mapping[str, str]) -> dict[str, Any]:
    """The settings that count: those that a table does not name."""
    return {name: value for name, value in settings.items() if name not in uncounted}
