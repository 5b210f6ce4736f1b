"""One whole run: measure the base, attach, train, measure again, save, and load on a fresh base.

`finetune` does it and returns a `Result`; the command line prints it.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lora_lite as ll
from lora_lite.lab.errors import RunError
from lora_lite.lab.models.devices import pick_device, pick_dtype
from lora_lite.lab.models.load import load_model
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.task import Example, Task, require_sound_key
from lora_lite.lab.terminal import note
from lora_lite.lab.training.config import CALIBRATION_BATCHES, RunConfig
from lora_lite.lab.training.data import Encoded, collate, encode
from lora_lite.lab.training.evaluate import Evaluation, evaluate
from lora_lite.lab.training.loop import train
from lora_lite.lab.training.place import Place
from lora_lite.lab.training.progress import TrainConfig
from lora_lite.lab.training.result import Result, describe_data, earlier_result, summarize, write_result
from lora_lite.lab.training.trackers import Trackers, require_trackers
from lora_lite.registry import method_of


class Clock:
    """Seconds of each named phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - started, 2)


def finetune(run: RunConfig, method: ll.AdapterConfig | Sequence[ll.AdapterConfig], training: TrainConfig) -> Result:
    """Measure, attach, train, measure, save, reload and compare. Writes `adapter.safetensors` and `result.json`; the
    checkpoints go when the run is whole. To resume a run that is finished gives its result again.

    Raises:
        RunError: the output folder holds another run or is in use, there is nothing to resume, the device is not
            here, or the reloaded adapter answers differently.
        ModelError, TaskError, DataError, TrainingError, TargetError, ...: as each part says.
    """
    run = run.named([method] if isinstance(method, ll.AdapterConfig) else method)
    note(f"results go to {run.out}")
    place = Place(run.out, run.resume, run.overwrite)
    if run.resume and place.result.exists():
        note(f"{run.out} holds this run, and it is finished: its result is reported again")
        return earlier_result(place.result, run, method, training)
    place.require_fit()
    device = pick_device(run.device)
    dtype = pick_dtype(run.dtype, device)
    require_trackers(run.report_to)
    task = load_task(run.task)
    train_set, few_train = task.up_to("train", run.train_examples, training.seed)
    test_set, few_test = task.up_to("test", run.test_examples)
    require_sound_key(task, test_set)
    with place.taken():
        few = (*few_train, *few_test)
        return _finetune(run, method, training, device, dtype, place, task, train_set, test_set, few)


def _finetune(
    run: RunConfig,
    method: ll.AdapterConfig | Sequence[ll.AdapterConfig],
    training: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    place: Place,
    task: Task,
    train_set: Sequence[Example],
    test_set: Sequence[Example],
    few: Sequence[str],
) -> Result:
    """`finetune` on data that is read, in a folder that no other run uses."""
    clock = Clock()
    load = partial(
        load_model, run.model, dtype, device, quantization=run.quantization, trust_remote_code=run.trust_remote_code
    )
    with clock("load"):
        model, tokenizer = load()
        items, report = encode(train_set, tokenizer, run.max_length)
    data = describe_data(task, train_set, test_set, report)
    data["notes"] += few
    note("\n".join((f"{run.task}: {report}; {len(test_set)} held-out items", *data["notes"])))
    with clock("evaluate_before"):
        before = evaluate(model, tokenizer, task, test_set)
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    with clock("attach"):
        batches = calibration(method, items, pad, training.batch_size, run.calibration_batches)
        att = ll.attach(model, method, batches, train_also=run.train_also)
    note(att.summary())
    place.clear()
    settings = {"run": dataclasses.asdict(run), "training": dataclasses.asdict(training)}
    with Trackers(run.report_to, run.out, settings, device) as trackers:
        with clock("train"):
            progress = train(model, items, pad, training, place.checkpoints, run.resume, on_step=trackers.step)
        with clock("evaluate_after"):
            after = evaluate(model, tokenizer, task, test_set)
        trackers.finish({"accuracy_before": before.accuracy, "accuracy_after": after.accuracy})
    adapter = ll.save(model, place.adapter)
    with clock("reload"):
        compare_reloaded(load, model, tokenizer, task, test_set[: run.reload_examples], adapter)
    result = Result(before, after, progress, att.summary(), clock.seconds, data)
    result.summary = summarize(run, method, training, result, att, device, dtype, adapter)
    write_result(place.result, result)
    shutil.rmtree(place.checkpoints, ignore_errors=True)  # the run is whole: nothing is left to resume
    return result


def needs_data(methods: Sequence[ll.AdapterConfig]) -> bool:
    """Whether one of the methods is calibrated on data."""
    return any(method_of(cfg).needs(cfg) for cfg in methods)


def calibration(
    method: ll.AdapterConfig | Sequence[ll.AdapterConfig],
    items: Sequence[Encoded],
    pad: int,
    batch_size: int,
    number: int = CALIBRATION_BATCHES,
) -> list[dict[str, Any]] | None:
    """The first `number` training batches (or as many as there are), if a method needs them."""
    methods = [method] if isinstance(method, ll.AdapterConfig) else method
    if not needs_data(methods):
        return None
    starts = range(0, min(len(items), number * batch_size), batch_size)
    batches = [collate(items[start : start + batch_size], pad) for start in starts]
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]


def compare_reloaded(
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    adapter: Path,
) -> None:
    """Load an adapter's file onto a fresh base, and raise `RunError` where it answers otherwise than `model` does."""
    if not examples:
        return
    # Answered again, in one batch: padded otherwise, a near tie could turn out otherwise.
    answers = evaluate(model, tokenizer, task, examples, progress=False)
    fresh = load()
    ll.load(fresh[0], adapter)
    require_same_answers(answers, evaluate(*fresh, task, examples, progress=False), adapter)


def require_same_answers(trained: Evaluation, reloaded: Evaluation, adapter: Path) -> None:
    """Raise `RunError` where the reloaded adapter answers otherwise than the trained one."""
    for ours, again in zip(trained.records, reloaded.records, strict=True):
        if ours.completion != again.completion:
            raise RunError(
                f"{adapter}: the reloaded adapter answers {again.completion!r} where the trained one said "
                f"{ours.completion!r} (prompt: {ours.prompt!r})"
            )
