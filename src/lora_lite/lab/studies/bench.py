"""Run a study: one job after the other, each into the ledger, until all are there."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.files.atomic import expanded
from lora_lite.lab.costs.cost import measured_costs
from lora_lite.lab.folders import make_folder
from lora_lite.lab.provenance import provenance
from lora_lite.lab.studies.ledger import DONE, FAILED, Ledger, publish, run_id
from lora_lite.lab.studies.plan import chosen_rates, job_config, read_plan
from lora_lite.lab.studies.study import Job, Study, StudyError, jobs
from lora_lite.lab.studies.workbench import Workbench, open_workbench, plan_of
from lora_lite.lab.terminal import note
from lora_lite.lab.training.checkpoints import fingerprint, last_checkpoint, read_progress
from lora_lite.lab.training.evaluate import Evaluation
from lora_lite.lab.training.loop import train
from lora_lite.lab.training.progress import Progress
from lora_lite.lab.training.run import calibration
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
    bench.trackers = partial(Trackers, report_to, device=bench.device)
    plan = {**plan_of(bench), "command": command}
    make_folder(folder)
    require_same_study(folder, study, plan)
    publish(folder / "study.json", plan)
    publish(ledger.data / f"{bench.prints['test']}.json", [[e.prompt, e.answer] for e in bench.test])
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


def require_same_study(folder: Path, study: Study, plan: dict[str, Any]) -> None:
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


def shared_config(study: Study, plan: dict[str, Any]) -> dict[str, Any]:
    """What the configurations of a study's training runs have in common: those of LoRA's, by name."""
    plain = dataclasses.replace(study, methods=("lora",), baseline="")
    config = job_config(plain, Job("tune", plain.arms()[0]), plan)
    prints, training, (method,) = (config.pop(key) for key in ("prints", "training", "methods"))
    return {**method, **training, **config, **{f"data: {part}": digest for part, digest in prints.items()}}


def remaining(study: Study, plan: dict[str, Any], ledger: Ledger) -> list[Job]:
    """The jobs that can be done, and are not. Costs come when all else is there: a clock wants a quiet machine."""
    rates = chosen_rates(study, plan, ledger)
    todo = [job for job in jobs(study, rates) if ledger.read(run_id(job_config(study, job, plan))) is None]
    return [job for job in todo if job.kind != "cost"] or todo


def do_one(todo: list[Job], bench: Workbench, plan: dict[str, Any], ledger: Ledger) -> bool:
    """Do the first job that no other process is at; whether there was one."""
    for job in todo:
        config = job_config(bench.study, job, plan)
        # One at a time: what is timed shares the machine with nothing else of the study.
        alone = ledger.claim("costs") if job.kind == "cost" else contextlib.nullcontext(True)
        with alone as free, ledger.claim(run_id(config)) as mine:
            if free and mine:
                note(f"[{len(todo)} to do] {job}")
                status, found = attempt(job, bench, ledger.scratch(run_id(config)))
                ledger.write(config, status, found)
                ledger.tidy(run_id(config))
                note(f"  {told(status, found)}")
                if status == FAILED:  # after its record: should this fail too, the next start goes on with the others
                    bench.reload()
                return True
    return False


def told(status: str, found: Mapping[str, Any]) -> str:
    """A line about a run."""
    words = [f"{found['seconds_in_all']:.0f} s"]
    if status == FAILED:
        words.append(f"FAILED: {found['reason']}")
    if losses := found.get("losses_after"):
        words.append(f"validation loss {losses['validation']:.4f}")
    if "accuracy" in found:
        words.append(f"accuracy {found['accuracy']:.1%}")
    return ", ".join(words)


def attempt(job: Job, bench: Workbench, scratch: Path) -> tuple[str, dict[str, Any]]:
    """Do a job; its status and what it found. A failure is a result: its reason is kept."""
    started = time.time()
    try:
        status, found = DONE, perform(job, bench, scratch)
        bench.require_base()
    except OSError:
        raise
    except FAILURES as error:
        status, found = FAILED, {"reason": f"{type(error).__name__}: {error}"}
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
    seconds = round(time.time() - started, 2)
    return status, {**found, "started": stamp, "seconds_in_all": seconds, "provenance": provenance(bench.device)}


def perform(job: Job, bench: Workbench, scratch: Path) -> dict[str, Any]:
    """Do a job, and leave the model bare."""
    if job.kind == "base":
        return {"losses_after": bench.losses(forgetting=True, trained=False), **replies(bench.answers())}
    assert job.arm is not None
    if job.kind == "cost":
        study = bench.study
        configs, trust = job.arm.with_seed(job.seed), study.trust_remote_code
        return {"cost": measured_costs(study.model, configs, bench.dtype, study.quantization, trust_remote_code=trust)}
    return train_and_measure(job, bench, scratch)


def train_and_measure(job: Job, bench: Workbench, scratch: Path) -> dict[str, Any]:
    """Attach, train, measure, detach. Goes on from a checkpoint in `scratch`, if a killed process left one."""
    assert job.arm is not None
    methods = job.arm.with_seed(job.seed)
    training = dataclasses.replace(bench.study.training, lr=job.lr, seed=job.seed)
    seconds: dict[str, float] = {}
    checkpoint = last_checkpoint(scratch)
    if checkpoint is not None and read_progress(checkpoint)[1] != fingerprint(training, bench.train):
        note(f"{checkpoint} was written by another version of the lab: it is discarded, and the run starts again")
        shutil.rmtree(scratch)
        checkpoint = None
    if checkpoint is None:
        data = calibration(methods, bench.train, bench.pad, training.batch_size, bench.study.calibration_batches)
        cost = ll.attach(bench.model, methods, data).cost
        seconds |= {f"attach_{phase}": value for phase, value in cost.seconds.items()} if cost else {}
    settings = {"job": str(job), "training": dataclasses.asdict(training)}
    with bench.trackers(scratch.parent.parent / "trackers" / scratch.name, settings) as trackers:
        progress = train(bench.model, bench.train, bench.pad, training, scratch, resume=True, on_step=trackers.step)
        found, more = measured(job, bench, scratch, progress)
        trackers.finish({key: found[key] for key in ("losses_after", "accuracy") if key in found})
    ll.detach(bench.model)
    seconds |= {"train": progress.seconds, **more}
    return {**found, "seconds": {key: round(value, 3) for key, value in seconds.items()}}


def measured(job: Job, bench: Workbench, scratch: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, float]]:
    """What is measured of a trained adapter, and the seconds that it took."""
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {
        "curve": [round(loss, 6) for loss in progress.losses],
        "tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "losses_after": bench.losses(forgetting=job.kind == "seed"),
        "trainable": ll.attachment(bench.model).num_trainable,
        "stored_bytes": ll.save(bench.model, scratch / "adapter.safetensors").stat().st_size,
    }
    if job.kind == "seed":
        answers = bench.answers()
        found |= replies(answers)
        seconds["evaluate"] = answers.seconds
    return found, seconds


def replies(answers: Evaluation) -> dict[str, Any]:
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
