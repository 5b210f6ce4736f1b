"""What a training run found: as an object, as the file `result.json`, and read from there again."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import lora_lite as ll
from lora_lite.files.atomic import write_atomically
from lora_lite.lab import identity
from lora_lite.lab.errors import RunError
from lora_lite.lab.provenance import Provenance, provenance
from lora_lite.lab.training.config import RunConfig, described
from lora_lite.lab.training.data import TokenRecord
from lora_lite.lab.training.evaluate import Evaluation, Record
from lora_lite.lab.training.progress import Progress, TrainConfig
from lora_lite.lab.training.session import Session, Trained
from lora_lite.runtime.attach_cost import peak_memory_mb

Methods = Sequence[ll.AdapterConfig]


class DataRecord(TypedDict):
    """What a run was given.

    prints, examples: fingerprint (16 hex digits) and number of examples of "train" and "test". task: its sources, with
    what it left out. tokens: what became of the training examples. notes: what a reader must know. prompts:
    the "instruction" of the training examples and whether they go into the "chat" template; None where they differ.
    """

    prints: dict[str, str]
    examples: dict[str, int]
    task: dict[str, Any]
    tokens: TokenRecord
    notes: list[str]
    prompts: dict[str, Any] | None


class Asked(TypedDict):
    """All settings of a run: each method's (`described`), and the fields of its `TrainConfig` and `RunConfig`."""

    methods: list[dict[str, Any]]
    training: dict[str, Any]
    run: dict[str, Any]


class Summary(Asked, Provenance):
    """Everything needed to read, and to repeat, a result: the last line of output.

    Attributes:
        accuracy_before, accuracy_after, mention_rate_before, mention_rate_after, cut_off_after: shares of the `items`
            held-out items; see `Evaluation`.
        verifier_failures: replies without a score, "before" and "after".
        trainable: trained values.
        adapter, adapter_bytes: the file.
        reloaded_answers_compared: items that the adapter, loaded on a fresh base, answered as the trained one did.
        seconds: by phase: "load", "evaluate_before", "attach", "train", "evaluate_after", "reload".
        tokens_per_second: of training, padding left out.
        peak_memory_mb: in 10^6 bytes, of the GPU where there is one, else of the process.
        final_loss: of the last step, in nats an answer token.
        dtype: of the base, as "float32".
    """

    accuracy_before: float
    accuracy_after: float
    mention_rate_before: float
    mention_rate_after: float
    cut_off_after: float
    verifier_failures: dict[str, int]
    items: int
    data: DataRecord
    trainable: int
    adapter: str
    adapter_bytes: int
    reloaded_answers_compared: int
    seconds: dict[str, float]
    tokens_per_second: float
    peak_memory_mb: float
    final_loss: float
    dtype: str


@dataclass(frozen=True)
class Result:
    """What a run found. attachment: what was attached, in words."""

    before: Evaluation
    after: Evaluation
    progress: Progress
    attachment: str
    summary: Summary


def describe_data(session: Session) -> DataRecord:
    """What a session's run was given."""
    data = session.data
    forms = {(example.instruction, example.chat) for example in data.examples["train"]}
    return {
        "prints": data.fingerprints,
        "examples": data.counts,
        "task": dict(data.task.provenance),
        "tokens": session.tokens["train"].record(),
        "notes": data.notes,
        "prompts": dict(zip(("instruction", "chat"), forms.pop(), strict=True)) if len(forms) == 1 else None,
    }


@dataclass(frozen=True)
class Measured:
    """What `summarize` is made from. adapter: the file. seconds: by phase."""

    session: Session
    before: Evaluation
    after: Evaluation
    trained: Trained
    adapter: Path
    seconds: dict[str, float] = field(default_factory=dict)


def summarize(run: RunConfig, methods: Methods, training: TrainConfig, measured: Measured) -> Result:
    """The result of a run: what was asked for, and what was measured."""
    before, after, progress, att = (
        measured.before,
        measured.after,
        measured.trained.progress,
        measured.trained.attachment,
    )
    base = measured.session.base
    summary: Summary = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "mention_rate_before": before.mention_rate,
        "mention_rate_after": after.mention_rate,
        "cut_off_after": after.cut_off,
        "verifier_failures": {"before": before.failures, "after": after.failures},
        "items": len(after.records),
        "data": describe_data(measured.session),
        "trainable": att.num_trainable,
        "adapter": str(measured.adapter),
        "adapter_bytes": measured.adapter.stat().st_size,
        "reloaded_answers_compared": min(run.reload_examples, len(after.records)),
        "seconds": measured.seconds,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(base.device), 1),
        "final_loss": progress.losses[-1],
        **asked_for(run, methods, training),
        "dtype": base.dtype_name,
        **provenance(base.device),
    }
    return Result(before, after, progress, att.summary(), summary)


def asked_for(run: RunConfig, methods: Methods, training: TrainConfig) -> Asked:
    """All settings of a run as plain data."""
    return {
        "methods": [described(cfg) for cfg in methods],
        "training": dataclasses.asdict(training),
        "run": {**dataclasses.asdict(run), "out": str(run.out)},
    }


def write_result(path: Path, result: Result) -> None:
    """Write summary, losses and every item's answers as JSON; `read_result` reads it."""
    progress = dataclasses.asdict(result.progress)
    data: dict[str, object] = {
        **result.summary,
        "attachment": result.attachment,
        "losses": progress.pop("losses"),
        "progress": progress,
    }
    for when, evaluation in (("before", result.before), ("after", result.after)):
        values = dataclasses.asdict(evaluation)
        data[when] = values.pop("records")
        data[f"evaluation_{when}"] = values
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
        attachment = data.pop("attachment")
        if absent := sorted(Summary.__required_keys__ - data.keys()):
            raise KeyError(absent[0])
        return Result(before, after, progress, attachment, cast(Summary, data))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged, or another version of the lab wrote it ({type(error).__name__}: {error}): give "
            "another --out, or --overwrite to make the run again"
        ) from error


def earlier_result(path: Path, run: RunConfig, methods: Methods, training: TrainConfig) -> Result:
    """The result of a finished run, if it is what is asked for. Raises `RunError`, with the settings that differ."""
    result = read_result(path)
    asked = json.loads(json.dumps(asked_for(run, methods, training)))  # as a file gives it: lists, no tuples
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


def settings(asked: Asked) -> dict[str, object]:
    """What a run's outcome depends on, by names such as "run.task"."""
    parts: dict[str, Mapping[str, object]] = {
        "run": identity.counted(asked["run"], identity.RUN),
        "training": asked["training"],
        **{f"methods.{place}": method for place, method in enumerate(asked["methods"])},
    }
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
