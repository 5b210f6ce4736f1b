"""Run a study: one job after the other, each into the ledger, until all are there."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lora_lite as ll
from lora_lite.files.atomic import expanded
from lora_lite.lab.costs.cost import measured_costs
from lora_lite.lab.folders import make_folder
from lora_lite.lab.identity import BASE, COST, SEED
from lora_lite.lab.provenance import provenance
from lora_lite.lab.studies.ledger import Ledger, publish, run_id
from lora_lite.lab.studies.plan import job_config, remaining, require_same_study
from lora_lite.lab.studies.records import (
    DONE,
    FAILED,
    BaseFigures,
    CostFigures,
    Losses,
    Plan,
    Replies,
    SeedFigures,
    TuneFigures,
)
from lora_lite.lab.studies.study import Job, Study
from lora_lite.lab.studies.workbench import Workbench, open_workbench, plan_of
from lora_lite.lab.terminal import note
from lora_lite.lab.training.checkpoints import fingerprint, last_checkpoint, read_progress
from lora_lite.lab.training.evaluate import Evaluation
from lora_lite.lab.training.progress import TrainConfig
from lora_lite.lab.training.session import Trained
from lora_lite.lab.training.trackers import Trackers, require_trackers

POLL_SECONDS = 2.0
# What a method, a setting or the data can cause. A full disk, say, is no result of a run: it stops the study.
FAILURES = (ll.LoraLiteError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


def run_study(
    study: Study, folder: Path, command: str = "", retry_failed: bool = False, report_to: Sequence[str] = ()
) -> Ledger:
    """Do all that a study asks for and the folder does not hold yet; returns the ledger.

    May be stopped at any moment, and started again with the same folder; several processes may work on one.
    command: what a reader types to run it again. retry_failed: try failed runs again. report_to: trackers, which write
    to `folder`/trackers/RUN.
    Raises what is wrong with the study's task, data or model before anything is run; `StudyError` if the folder holds
    the results of another study.
    """
    folder = expanded(folder)
    ledger = Ledger(folder)
    study = study.as_run()  # errors in the line of arms, and missing trackers, come before the model is loaded
    require_trackers(report_to)
    bench = open_workbench(study)
    bench.trackers = partial(Trackers, report_to, device=bench.session.base.device)
    plan = plan_of(bench, command)
    make_folder(folder)
    require_same_study(folder, study, plan)
    publish(folder / "study.json", plan)
    items = bench.session.data.examples["test"]
    publish(ledger.data / f"{bench.fingerprints['test']}.json", [[item.prompt, item.answer] for item in items])
    if retry_failed and (removed := ledger.forget_failures()):
        note(f"{removed} failed runs are tried again")
    waiting = False
    while todo := remaining(study, plan, ledger):
        if do_one(todo, bench, plan, ledger):
            waiting = False
            continue
        if not waiting:
            note(f"waiting for another process, which is at {', '.join(map(str, todo[:4]))}")
        waiting = True
        time.sleep(POLL_SECONDS)
    return ledger


def do_one(todo: list[Job], bench: Workbench, plan: Plan, ledger: Ledger) -> bool:
    """Do the first job that no other process is at; whether there was one."""
    for job in todo:
        config = job_config(bench.study, job, plan)
        # One at a time: what is timed shares the machine with nothing else of the study.
        alone = ledger.claim("costs") if job.kind == COST else contextlib.nullcontext(True)
        with alone as free, ledger.claim(run_id(config)) as mine:
            if free and mine:
                note(f"[{len(todo)} to do] {job}")
                status, figures = attempt(job, bench, ledger.scratch(run_id(config)))
                ledger.write(config, status, figures)
                ledger.tidy(run_id(config))
                note(f"  {in_a_line(status, figures)}")
                if status == FAILED:  # after its record: should this fail too, the next start goes on with the others
                    bench.session.reload()
                return True
    return False


def in_a_line(status: str, figures: Mapping[str, Any]) -> str:
    """A run in a line."""
    words = [f"{figures['seconds_in_all']:.0f} s"]
    if status == FAILED:
        words.append(f"FAILED: {figures['reason']}")
    if losses := figures.get("losses_after"):
        words.append(f"validation loss {losses['validation']:.4f}")
    if "accuracy" in figures:
        words.append(f"accuracy {figures['accuracy']:.1%}")
    return ", ".join(words)


def attempt(job: Job, bench: Workbench, scratch: Path) -> tuple[str, Mapping[str, object]]:
    """Do a job; its status and figures. A failure is a result: its reason is kept."""
    started = time.time()
    try:
        status, figures = DONE, perform(job, bench, scratch)
        bench.require_base()
    except OSError:
        raise
    except FAILURES as error:
        status, figures = FAILED, {"reason": f"{type(error).__name__}: {error}"}
    return status, {
        **figures,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds_in_all": round(time.time() - started, 2),
        "provenance": provenance(bench.session.base.device),
    }


def perform(job: Job, bench: Workbench, scratch: Path) -> BaseFigures | TuneFigures | SeedFigures | CostFigures:
    """Do a job, and leave the model bare."""
    if job.kind == BASE:
        losses = cast(Losses, bench.losses(forgetting=True, trained=False))
        return {"losses_after": losses, **replies(bench.answers())}
    assert job.arm is not None
    methods = job.arm.with_seed(job.seed)
    if job.kind == COST:
        return {"cost": measured_costs(bench.session.base, methods)}
    return train_and_measure(job, methods, bench, scratch)


def train_and_measure(
    job: Job, methods: Sequence[ll.AdapterConfig], bench: Workbench, scratch: Path
) -> TuneFigures | SeedFigures:
    """Attach, train, measure, detach. Goes on from a checkpoint in `scratch`, if a killed process left one."""
    session, study = bench.session, bench.study
    training = dataclasses.replace(study.training, lr=job.lr, seed=job.seed)
    discard_foreign(scratch, training, bench)
    settings = {"job": str(job), "training": dataclasses.asdict(training)}
    with bench.trackers(scratch.parent.parent / "trackers" / scratch.name, settings) as trackers:
        trained = session.attach_and_train(
            methods, training, scratch, resume=True, calibration_batches=study.calibration_batches,
            on_step=trackers.step,
        )  # fmt: skip
        figures = measured(job, bench, scratch, trained)
        trackers.finish({key: value for key, value in figures.items() if key in ("losses_after", "accuracy")})
    ll.detach(session.model)
    return figures


def discard_foreign(scratch: Path, training: TrainConfig, bench: Workbench) -> None:
    """Remove the checkpoints that no run of this version can go on from."""
    checkpoint = last_checkpoint(scratch)
    if checkpoint is None or read_progress(checkpoint)[1] == fingerprint(training, bench.session.encoded["train"]):
        return
    note(f"{checkpoint} was written by another version of the lab: it is discarded, and the run starts again")
    shutil.rmtree(scratch)


def measured(job: Job, bench: Workbench, scratch: Path, trained: Trained) -> TuneFigures | SeedFigures:
    """What is measured of a trained adapter."""
    att, progress = trained.attachment, trained.progress
    phases = att.cost.seconds if att.cost is not None else {}
    seconds = {**{f"attach_{phase}": value for phase, value in phases.items()}, "train": progress.seconds}
    figures: TuneFigures = {
        "curve": [round(loss, 6) for loss in progress.losses],
        "tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "losses_after": cast(Losses, bench.losses(forgetting=job.kind == SEED)),
        "trainable": att.num_trainable,
        "stored_bytes": ll.save(bench.session.model, scratch / "adapter.safetensors").stat().st_size,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
    }
    if job.kind != SEED:
        return figures
    answers = bench.answers()
    figures["seconds"]["evaluate"] = round(answers.seconds, 3)
    return {**figures, **replies(answers)}


def replies(answers: Evaluation) -> Replies:
    """An evaluation as plain data; prompts and answers are in the ledger's data, in the same order."""
    return {
        "accuracy": answers.accuracy,
        "mentioned": answers.mention_rate,
        "cut_off": answers.cut_off,
        "verifier_failures": answers.failures,
        "new_tokens": answers.new_tokens,
        "scores": [record.score for record in answers.records],
        "completions": [record.completion for record in answers.records],
    }
