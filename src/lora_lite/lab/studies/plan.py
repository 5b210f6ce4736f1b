"""What a folder of results was asked for, and by which names its runs are found. Nothing here runs anything."""

import dataclasses
from pathlib import Path
from typing import Any

from lora_lite.files.atomic import expanded
from lora_lite.lab.studies.arms import ArmError
from lora_lite.lab.studies.ledger import DONE, Ledger, LedgerError, read_json, run_id, within
from lora_lite.lab.studies.study import Job, Study, StudyError
from lora_lite.lab.training.config import CALIBRATION_BATCHES

# What `study.json` must hold: keys from the outermost in, and the type of what is there.
PLAN: dict[tuple[str, ...], type] = {
    ("study",): dict, **{("prints", part): str for part in ("base", "train", "validation", "test", "other", "general")},
    ("dtype",): str, ("device",): str, ("max_new_tokens",): int, ("sources", "notes"): list, ("command",): str,
    **{("sources", "tokens", "train", key): int for key in ("kept", "too_long", "empty")},
    ("sources", "tokens", "validation", "kept"): int,
}  # fmt: skip


def read_plan(folder: Path) -> tuple[Study, dict[str, Any]]:
    """The study of a folder of results, and what its runs are found by. Raises `LedgerError` where there is none."""
    path = expanded(folder) / "study.json"
    plan = read_json(path)
    wrong = [".".join(keys) for keys, kind in PLAN.items() if not isinstance(within(plan, keys), kind)]
    if wrong:
        raise LedgerError(
            f"{path} is damaged: {wrong[0]} is missing or of another type; remove it, and the same bench makes it again"
        )
    try:
        study = Study.from_dict(plan["study"])
        study.arms()
    except (StudyError, ArmError) as error:
        raise LedgerError(f"{path} is damaged: {error}; remove it, and the same bench makes it again") from error
    return study, plan


def job_config(study: Study, job: Job, plan: dict[str, Any]) -> dict[str, Any]:
    """All that a job's result depends on, as plain data: its hash names the run.

    plan: `prints`, `dtype`, `device` and `max_new_tokens`, as `plan_of` gives them. Names, notes and how often
    checkpoints are written are left out; so a study can grow, and keep what it has.
    """
    used = {"base": ("base", "validation", "test", "general", "other"), "tune": ("base", "train", "validation")}
    prints = {key: plan["prints"][key] for key in used.get(job.kind, plan["prints"])}
    config: dict[str, Any] = {
        "kind": job.kind, "model": study.model, "quantization": study.quantization, "dtype": plan["dtype"],
        "device": plan["device"],
    }  # fmt: skip
    if job.kind == "cost":
        prints = {"base": plan["prints"]["base"]}
    else:
        config |= {"task": study.task, "max_length": study.max_length}
    if job.kind in ("base", "seed"):
        config |= {"max_new_tokens": plan["max_new_tokens"]}
    if job.arm is not None:
        config["methods"] = study.described(job.arm, job.seed)
        if study.calibration_batches != CALIBRATION_BATCHES and job.arm.needs_data:
            config["calibration_batches"] = study.calibration_batches
    if job.kind in ("tune", "seed"):
        training = dataclasses.asdict(dataclasses.replace(study.training, lr=job.lr, seed=job.seed))
        config["training"] = {key: value for key, value in training.items() if key != "save_every"}
    return {**config, "prints": prints}


def chosen_rates(study: Study, plan: dict[str, Any], ledger: Ledger) -> dict[str, float | None]:
    """Arm -> the rate with the lowest validation loss, None if all failed. Left out: arms that are not tried at all
    rates yet."""
    chosen: dict[str, float | None] = {}
    for arm in study.arms():
        tried = {lr: ledger.figures(run_id(job_config(study, Job("tune", arm, lr), plan))) for lr in study.grid(arm)}
        records = {lr: record for lr, record in tried.items() if record is not None}
        if len(records) == len(tried):
            done = {lr: record for lr, record in records.items() if record["status"] == DONE}
            losses = {lr: record["losses_after"]["validation"] for lr, record in done.items()}
            chosen[arm.name] = min(losses, key=losses.__getitem__) if losses else None
    return chosen
