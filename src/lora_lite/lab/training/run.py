"""One whole run: measure the base, attach, train, measure again, save, and load on a fresh base.

`finetune` does it and returns a `Result`; the command line prints it.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lora_lite as ll
from lora_lite.lab.errors import RunError
from lora_lite.lab.models.base import Base
from lora_lite.lab.terminal import note
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.evaluate import Evaluation
from lora_lite.lab.training.place import Place
from lora_lite.lab.training.progress import TrainConfig
from lora_lite.lab.training.result import Measured, Result, earlier_result, summarize, write_result
from lora_lite.lab.training.session import Data, Session, draw
from lora_lite.lab.training.trackers import Trackers, require_trackers


class Clock:
    """Seconds of each named phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def note(self, phase: str, seconds: float) -> None:
        """Add a phase."""
        self.seconds[phase] = round(seconds, 2)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.note(phase, time.perf_counter() - started)


def finetune(run: RunConfig, method: ll.AdapterConfig | Sequence[ll.AdapterConfig], training: TrainConfig) -> Result:
    """Measure, attach, train, measure, save, reload and compare. Writes `adapter.safetensors` and `result.json`; the
    checkpoints go when the run is whole. To resume a run that is finished gives its result again.

    Raises:
        RunError: the output folder holds another run or is in use, there is nothing to resume, the device is not
            here, or the reloaded adapter answers differently.
        ModelError, TaskError, DataError, TrainingError, TargetError, ...: as each part says.
    """
    methods = [method] if isinstance(method, ll.AdapterConfig) else list(method)
    run = run.named(methods)
    note(f"results go to {run.out}")
    place = Place(run.out, run.resume, run.overwrite)
    if run.resume and place.result.exists():
        note(f"{run.out} holds this run, and it is finished: its result is reported again")
        return earlier_result(place.result, run, methods, training)
    place.require_fit()
    base = Base.of(run, run.device)
    require_trackers(run.report_to)
    data = draw(run.task, {"train": run.train_examples, "test": run.test_examples}, training.seed)
    with place.taken():
        return _finetune(run, methods, training, base, data, place)


def _finetune(
    run: RunConfig, methods: Sequence[ll.AdapterConfig], training: TrainConfig, base: Base, data: Data, place: Place
) -> Result:
    """`finetune` on data that is drawn, in a folder that no other run uses."""
    clock = Clock()
    with clock("load"):
        session = Session.open(base, data, run.max_length)
    held_out = f"{data.counts['test']} held-out items"
    note("\n".join((f"{run.task}: {session.tokens['train']}; {held_out}", *data.notes)))
    with clock("evaluate_before"):
        before = session.answers()

    def on_attach(att: ll.Attachment) -> None:
        note(att.summary())
        place.clear()

    settings = {"run": dataclasses.asdict(run), "training": dataclasses.asdict(training)}
    with Trackers(run.report_to, run.out, settings, base.device) as trackers:
        trained = session.attach_and_train(
            methods, training, place.checkpoints, run.resume, calibration_batches=run.calibration_batches,
            train_also=run.train_also, on_attach=on_attach, on_step=trackers.step,
        )  # fmt: skip
        clock.note("attach", trained.attach_seconds)
        clock.note("train", trained.train_seconds)
        with clock("evaluate_after"):
            after = session.answers()
        trackers.finish({"accuracy_before": before.accuracy, "accuracy_after": after.accuracy})
    adapter = ll.save(session.model, place.adapter)
    with clock("reload"):
        compare_reloaded(session, adapter, run.reload_examples)
    result = summarize(run, methods, training, Measured(session, before, after, trained, adapter, clock.seconds))
    write_result(place.result, result)
    shutil.rmtree(place.checkpoints, ignore_errors=True)  # the run is whole: nothing is left to resume
    return result


def compare_reloaded(session: Session, adapter: Path, items: int) -> None:
    """Load an adapter's file onto a fresh base, and raise `RunError` where it answers one of the first test items
    otherwise than the session's model does."""
    if not items:
        return
    # Answered again, in one batch: padded otherwise, a near tie could turn out otherwise.
    answers = session.answers(items, progress=False)
    fresh = session.with_fresh_base()
    ll.load(fresh.model, adapter)
    require_same_answers(answers, fresh.answers(items, progress=False), adapter)


def require_same_answers(trained: Evaluation, reloaded: Evaluation, adapter: Path) -> None:
    """Raise `RunError` where the reloaded adapter answers otherwise than the trained one."""
    for ours, again in zip(trained.records, reloaded.records, strict=True):
        if ours.completion != again.completion:
            raise RunError(
                f"{adapter}: the reloaded adapter answers {again.completion!r} where the trained one said "
                f"{ours.completion!r} (prompt: {ours.prompt!r})"
            )
