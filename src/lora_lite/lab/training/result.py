"""What a training run found: as an object, as the file `result.json`, and read from there again."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from lora_lite.files.atomic import write_atomically
from lora_lite.lab.errors import RunError
from lora_lite.lab.provenance import provenance
from lora_lite.lab.tasks.task import Example, Task, fingerprint
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.data import TokenReport
from lora_lite.lab.training.evaluate import Evaluation, Record
from lora_lite.lab.training.progress import Progress, TrainConfig
from lora_lite.registry import method_of
from lora_lite.runtime.attach_cost import peak_memory_mb

Methods = ll.AdapterConfig | Sequence[ll.AdapterConfig]
HOW = ("out", "resume", "overwrite", "device", "report_to", "probe")  # fields of a run that do not change what it finds


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


def describe_data(
    task: Task, train_set: Sequence[Example], test_set: Sequence[Example], report: TokenReport
) -> dict[str, Any]:
    """What a run was given, as plain data.

    prints, examples: fingerprint and size of both sets. task: its sources, with what it left out. tokens: what became
    of the training examples. notes: what a reader must know. prompts: the instruction of the training examples and
    whether they go into the chat template; None where they differ.
    """
    forms = {(example.instruction, example.chat) for example in train_set}
    return {
        "prints": {"train": fingerprint(train_set), "test": fingerprint(test_set)},
        "examples": {"train": len(train_set), "test": len(test_set)},
        "task": dict(task.provenance),
        "tokens": dataclasses.asdict(report),
        "notes": list(task.notes),
        "prompts": dict(zip(("instruction", "chat"), forms.pop(), strict=True)) if len(forms) == 1 else None,
    }


def summarize(
    run: RunConfig,
    method: Methods,
    training: TrainConfig,
    result: Result,
    att: ll.Attachment,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Path,
) -> dict[str, Any]:
    """Everything needed to read, and to repeat, the result."""
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
        **asked_for(run, method, training),
        "dtype": str(dtype).removeprefix("torch."),
        **provenance(device),
    }


def asked_for(run: RunConfig, method: Methods, training: TrainConfig) -> dict[str, Any]:
    """All settings of a run as plain data: "methods", "training" and "run"."""
    methods = [method] if isinstance(method, ll.AdapterConfig) else list(method)
    return {
        "methods": [{"variant": method_of(cfg).facts.name, **cfg.to_dict()} for cfg in methods],
        "training": dataclasses.asdict(training),
        "run": {**dataclasses.asdict(run), "out": str(run.out)},
    }


def write_result(path: Path, result: Result) -> None:
    """Write summary, losses and every item's answers as JSON; `read_result` reads it."""
    progress = dataclasses.asdict(result.progress)
    data = {
        **result.summary,
        "attachment": result.attachment,
        "losses": progress.pop("losses"),
        "progress": progress,
        **{when: dataclasses.asdict(getattr(result, when)) for when in ("before", "after")},
    }
    for when in ("before", "after"):
        evaluation = data.pop(when)
        data[when] = evaluation.pop("records")
        data[f"evaluation_{when}"] = evaluation
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def read_result(path: Path) -> Result:
    """The result that `write_result` wrote. Raises `RunError` for a file that is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        progress = Progress(data.pop("losses"), **data.pop("progress"))
        before, after = (
            Evaluation(tuple(Record(**record) for record in data.pop(when)), **data.pop(f"evaluation_{when}"))
            for when in ("before", "after")
        )
        return Result(before, after, progress, data.pop("attachment"), data["seconds"], data["data"], data)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged, or another version of the lab wrote it ({type(error).__name__}: {error}): give "
            "another --out, or --overwrite to make the run again"
        ) from error


def earlier_result(path: Path, run: RunConfig, method: Methods, training: TrainConfig) -> Result:
    """The result of a finished run, if it is what is asked for. Raises `RunError`, with the settings that differ."""
    result = read_result(path)
    asked = json.loads(json.dumps(asked_for(run, method, training)))  # as a file gives it: lists, no tuples
    there, now = settings(result.summary), settings(asked)
    other = [
        f"{name}: {there.get(name)!r} there, {now.get(name)!r} now" for name in now if there.get(name) != now[name]
    ]
    if other or there.keys() - now.keys():
        raise RunError(
            f"{path.parent} holds a finished run with other settings ({'; '.join(other[:4])}): give another --out, or "
            "--overwrite to give it up"
        )
    return result


def settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's outcome depends on, by names such as "run.task"."""
    parts = {"run": summary["run"], "training": summary["training"]}
    parts |= {f"methods.{place}": method for place, method in enumerate(summary["methods"])}
    return {
        f"{part}.{name}": value
        for part, values in parts.items()
        for name, value in values.items()
        if not (part == "run" and name in HOW)
    }
