"""What a folder of results is of: its plan, which jobs that asks for, and what each is found by. Runs nothing."""

import dataclasses
from pathlib import Path
from typing import Any, cast

from lora_lite.files.atomic import expanded
from lora_lite.lab import identity
from lora_lite.lab.studies.arms import ArmError
from lora_lite.lab.studies.ledger import Ledger, LedgerError, read_json, run_id
from lora_lite.lab.studies.records import DONE, JobConfig, Plan
from lora_lite.lab.studies.shapes import lacking
from lora_lite.lab.studies.study import Job, Study, StudyError, jobs
from lora_lite.lab.training.config import CALIBRATION_BATCHES, needs_data


def read_plan(folder: Path) -> tuple[Study, Plan]:
    """The study of a folder of results, and what its runs are found by. Raises `LedgerError` where there is none."""
    path = expanded(folder) / "study.json"
    plan = read_json(path)
    if wrong := next(lacking(plan, Plan), ""):
        raise LedgerError(
            f"{path} is damaged: {wrong} is missing or of another type; remove it, and the same bench makes it again"
        )
    try:
        study = Study.from_dict(plan["study"])
        study.arms()
    except (StudyError, ArmError) as error:
        raise LedgerError(f"{path} is damaged: {error}; remove it, and the same bench makes it again") from error
    return study, plan


def job_config(study: Study, job: Job, plan: Plan) -> JobConfig:
    """All that a job's result depends on, as plain data: its hash names the run. `identity` says what that is."""
    configs = job.arm.configs if job.arm is not None else ()
    calibrated = study.calibration_batches != CALIBRATION_BATCHES and needs_data(configs)
    training = dataclasses.asdict(dataclasses.replace(study.training, lr=job.lr, seed=job.seed))
    values = {
        "kind": job.kind,
        "model": study.model,
        "quantization": study.quantization,
        "dtype": plan["dtype"],
        "device": plan["device"],
        "task": study.task,
        "max_length": study.max_length,
        "max_new_tokens": plan["max_new_tokens"],
        "methods": study.described(job.arm, job.seed) if job.arm is not None else None,
        "calibration_batches": study.calibration_batches if calibrated else None,
        "training": identity.counted(training, identity.TRAINING),
    }
    config = {key: values[key] for key, kinds in identity.JOB.items() if job.kind in kinds and values[key] is not None}
    fingerprints = cast(dict[str, str], plan["prints"])
    config["prints"] = {part: fingerprints[part] for part, kinds in identity.DATA.items() if job.kind in kinds}
    return cast(JobConfig, config)


def require_same_study(folder: Path, study: Study, plan: Plan) -> None:
    """Raise `StudyError` if a folder's results are of another model, task, data or training: none could be used.

    A study may grow: more arms, seeds, rates and test items find what is there. Names, notes and costs do not matter.
    """
    if not (folder / "study.json").exists():
        return
    earlier, before_plan = read_plan(folder)
    before, now = shared_config(earlier, before_plan), shared_config(study, plan)
    if other := [f"{name}: {was!r} there, {now[name]!r} now" for name, was in before.items() if was != now[name]]:
        raise StudyError(
            f"{folder} holds the results of another study ({'; '.join(other)}): give another --out, or remove it"
        )
    known = {name: arm["methods"] for name, arm in study.arms_as_run.items()}
    there = {name: arm["methods"] for name, arm in earlier.arms_as_run.items()}
    if changed := [name for name in known.keys() & there.keys() if known[name] != there[name]]:
        raise StudyError(
            f"{folder} holds results of {', '.join(sorted(changed))} with other settings than these names have here (a "
            "default has changed since): give another --out"
        )


def shared_config(study: Study, plan: Plan) -> dict[str, Any]:
    """What the configurations of a study's training runs have in common: those of LoRA's, by name."""
    plain = dataclasses.replace(study, methods=("lora",), baseline="")
    config: dict[str, Any] = {**job_config(plain, Job(identity.TUNE, plain.arms()[0]), plan)}
    fingerprints, training, (method,) = (config.pop(key) for key in ("prints", "training", "methods"))
    return {**method, **training, **config, **{f"data: {part}": digest for part, digest in fingerprints.items()}}


def remaining(study: Study, plan: Plan, ledger: Ledger) -> list[Job]:
    """The jobs that can be done, and are not. Costs come when all else is there: a clock wants a quiet machine."""
    rates = chosen_rates(study, plan, ledger)
    todo = [job for job in jobs(study, rates) if ledger.read(run_id(job_config(study, job, plan))) is None]
    return [job for job in todo if job.kind != identity.COST] or todo


def chosen_rates(study: Study, plan: Plan, ledger: Ledger) -> dict[str, float | None]:
    """Arm -> the rate with the lowest validation loss, None if all failed. Left out: arms that are not tried at all
    rates yet."""
    chosen: dict[str, float | None] = {}
    for arm in study.arms():
        runs = {lr: run_id(job_config(study, Job(identity.TUNE, arm, lr), plan)) for lr in study.grid(arm)}
        records = {lr: record for lr, run in runs.items() if (record := ledger.figures(run)) is not None}
        if len(records) == len(runs):
            done = {lr: record for lr, record in records.items() if record["status"] == DONE}
            losses = {lr: record["losses_after"]["validation"] for lr, record in done.items()}
            chosen[arm.name] = min(losses, key=losses.__getitem__) if losses else None
    return chosen
