"""One whole run: measure the base, attach, train, measure again, save, and load on a fresh base.

`finetune` does it and returns a `Result`; the command line prints it.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from lora_lite.adapter import variant_of
from lora_lite.atomic import expanded, write_atomically
from lora_lite.cost import peak_memory_mb
from lora_lite.lab.catalogue import load_task
from lora_lite.lab.data import MAX_LENGTH, Encoded, TokenReport, collate, encode
from lora_lite.lab.evaluate import Evaluation, evaluate
from lora_lite.lab.models import EMBEDDED, load_model
from lora_lite.lab.place import Place, RunError
from lora_lite.lab.provenance import provenance
from lora_lite.lab.tasks import Example, Task, fingerprint, require_sound_key
from lora_lite.lab.terminal import note
from lora_lite.lab.trackers import Trackers, require_trackers
from lora_lite.lab.train import Progress, TrainConfig, train

CALIBRATION_BATCHES = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunConfig:
    """What to fine-tune, on what, and where to.

    Attributes:
        model: "smollm2" (embedded), a hub id or a local folder.
        task: "gsm8k", "metamath_gsm8k", a reasoning-gym task with parameters as in "gcd:max_value=100", several joined
            by "+", or your own questions and answers, "mine.jsonl" or "jsonl:path=mine.jsonl,score=numeric".
        quantization: of the base: "none", "4bit" or "8bit" (bitsandbytes).
        dtype: of the base: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.
        device: where to run. None: the GPU if there is one.
        train_examples: distinct examples to train on; all that there are where the task has fewer, which is said.
        test_examples: held-out items to measure on; all that there are where the task has fewer.
        calibration_batches: training batches that methods and bases which need data are calibrated on. Each is one
            forward pass; second moments are better told by 64.
        train_also: names or regexes of base parameters to train as well, such as a head or an embedding.
        reload_examples: items that the reloaded adapter must answer as the trained one did.
        max_length: longest example in tokens; longer ones are left out and counted.
        out: folder for the adapter, the checkpoints and the result.
        resume: go on from the last checkpoint in `out`.
        overwrite: give up what an earlier run left in `out`.
        trust_remote_code: run the code that a model's folder or hub id brings along.
        report_to: trackers: "tensorboard", "wandb", "trackio"; through accelerate.
        probe: instead of training, find out in under a minute whether the method works on the model.
    """

    model: str = EMBEDDED
    task: str = "family_relationships"
    quantization: str = "none"
    dtype: str = "auto"
    device: str | None = None
    train_examples: int = 640
    test_examples: int = 100
    calibration_batches: int = CALIBRATION_BATCHES
    reload_examples: int = 16
    train_also: tuple[str, ...] = ()
    max_length: int = MAX_LENGTH
    out: Path = Path("runs/latest")
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    report_to: tuple[str, ...] = ()
    probe: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", expanded(self.out))
        if self.resume and self.overwrite:
            raise ValueError("RunConfig.resume and overwrite exclude each other: one goes on, the other starts again")
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"RunConfig.dtype = {self.dtype!r}: must be one of auto, {', '.join(DTYPES)}")
        for name in ("train_examples", "test_examples", "calibration_batches", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"RunConfig.{name} = {getattr(self, name)}: must be an integer >= 1")
        if not 0 <= self.reload_examples <= self.test_examples:
            raise ValueError(f"RunConfig.reload_examples = {self.reload_examples}: must be in [0, test_examples]")


@dataclass
class Result:
    """What a run found. `data` is what `describe_data` says; `summary` is what the last line of output holds."""

    before: Evaluation
    after: Evaluation
    progress: Progress
    attachment: str
    seconds: dict[str, float]
    data: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def pick_device(device: str | None) -> torch.device:
    """The device asked for, or the GPU if there is one. Raises `RunError` for one that is not here."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's, of names, drivers and builds
        reason = str(error).splitlines()[0].strip() if str(error).strip() else type(error).__name__
        raise RunError(
            f"--device {name}: cannot be used here ({reason}); leave it out, or give cpu, cuda, ..."
        ) from error
    return found


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base; "auto" takes bfloat16 only where hardware computes it: elsewhere it is slower."""
    if name not in (*DTYPES, "auto"):
        raise RunError(f"dtype = {name!r}: must be one of auto, {', '.join(DTYPES)}")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


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
    checkpoints go when the run is whole.

    Raises:
        RunError: the output folder holds another run or is in use, there is nothing to resume, the device is not
            here, or the reloaded adapter answers differently.
        ModelError, TaskError, DataError, TrainingError, TargetError, ...: as each part says.
    """
    place = Place(run.out, run.resume, run.overwrite)
    place.require_fit()
    device = pick_device(run.device)
    dtype = pick_dtype(run.dtype, device)
    require_trackers(run.report_to)
    task = load_task(run.task)
    train_set, few_train = task.up_to("train", run.train_examples, training.seed)
    test_set, few_test = task.up_to("test", run.test_examples)
    require_sound_key(task, test_set)
    with place.taken():
        return _finetune(
            run, method, training, device, dtype, place, task, train_set, test_set, [*few_train, *few_test]
        )


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
    clock, load = (
        Clock(),
        partial(
            load_model, run.model, dtype, device, quantization=run.quantization, trust_remote_code=run.trust_remote_code
        ),
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
        # Answered anew, in one batch: padded otherwise, a near tie could turn out otherwise.
        examples = test_set[: run.reload_examples]
        if examples:
            answers = evaluate(model, tokenizer, task, examples, progress=False)
            fresh = load()
            ll.load(fresh[0], adapter)
            require_same_answers(answers, evaluate(*fresh, task, examples, progress=False), adapter)
    result = Result(before, after, progress, att.summary(), clock.seconds, data)
    result.summary = summarize(run, method, training, result, att, device, dtype, adapter)
    write_result(place.result, result)
    shutil.rmtree(place.checkpoints, ignore_errors=True)  # the run is whole: nothing is left to resume
    return result


def describe_data(
    task: Task, train_set: Sequence[Example], test_set: Sequence[Example], report: TokenReport
) -> dict[str, Any]:
    """What a run was given, as plain data.

    prints, examples: fingerprint and size of both sets. task: its sources, with what it left out. tokens: what became
    of the training examples. notes: what a reader must be told.
    """
    return {
        "prints": {"train": fingerprint(train_set), "test": fingerprint(test_set)},
        "examples": {"train": len(train_set), "test": len(test_set)},
        "task": dict(task.provenance),
        "tokens": dataclasses.asdict(report),
        "notes": list(task.notes),
    }


def needs_data(methods: Sequence[ll.AdapterConfig]) -> bool:
    """Whether one of the methods is calibrated on data."""
    return any(variant_of(cfg).needs(cfg) for cfg in methods)


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


def require_same_answers(trained: Evaluation, reloaded: Evaluation, adapter: Path) -> None:
    """Raise `RunError` where the reloaded adapter answers otherwise than the trained one."""
    for ours, again in zip(trained.records, reloaded.records, strict=True):
        if ours.completion != again.completion:
            raise RunError(
                f"{adapter}: the reloaded adapter answers {again.completion!r} where the trained one said "
                f"{ours.completion!r} (prompt: {ours.prompt!r})"
            )


def summarize(
    run: RunConfig,
    method: ll.AdapterConfig | Sequence[ll.AdapterConfig],
    training: TrainConfig,
    result: Result,
    att: ll.Attachment,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Path,
) -> dict[str, Any]:
    """Everything needed to read, and to repeat, the result."""
    methods = [method] if isinstance(method, ll.AdapterConfig) else list(method)
    return {
        "accuracy_before": result.before.accuracy,
        "accuracy_after": result.after.accuracy,
        "mention_rate_before": result.before.mention_rate,
        "mention_rate_after": result.after.mention_rate,
        "cut_off_after": result.after.cut_off,
        "verifier_failures": {"before": result.before.failures, "after": result.after.failures},
        "items": len(result.after.records),
        "data": result.data,
        "trainable": att.num_trainable,
        "adapter": str(adapter),
        "adapter_bytes": adapter.stat().st_size,
        "reloaded_answers_compared": min(run.reload_examples, len(result.after.records)),
        "seconds": result.seconds,
        "tokens_per_second": round(result.progress.tokens / result.progress.seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "final_loss": result.progress.losses[-1],
        "methods": [{"variant": variant_of(cfg).name, **cfg.to_dict()} for cfg in methods],
        "training": dataclasses.asdict(training),
        "run": {**dataclasses.asdict(run), "out": str(run.out)},
        "dtype": str(dtype).removeprefix("torch."),
        **provenance(device),
    }


def write_result(path: Path, result: Result) -> None:
    """Write summary, losses and every item's answers as JSON."""
    data = {
        **result.summary,
        "losses": result.progress.losses,
        "before": [dataclasses.asdict(record) for record in result.before.records],
        "after": [dataclasses.asdict(record) for record in result.after.records],
    }
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
