"""What was trained, found and checked before its model is read: the file, its base's name, how prompts were written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lora_lite as ll
from lora_lite.errors import CheckpointError
from lora_lite.files.atomic import expanded
from lora_lite.files.description import describe
from lora_lite.lab.errors import RunError
from lora_lite.lab.models.embedded import CONVERSION, EMBEDDED, ModelError
from lora_lite.lab.models.load import load_model
from lora_lite.lab.talking.prompts import PromptForm
from lora_lite.lab.training.place import Place


@dataclass(frozen=True)
class Trained:
    """An adapter's file, checked in itself, and what is known of it.

    where: the file. found: what `describe` says of it. base: the model's name, for `load_model`. named_by: what gave
    that name, in words. form: how training wrote its prompts; None where nothing tells.
    """

    where: Path
    found: Mapping[str, Any]
    base: str
    named_by: str
    form: PromptForm | None

    def __str__(self) -> str:
        methods = "+".join(each["method"] for each in self.found["methods"])
        return f"{methods} adapter {self.where}, on the base {self.base!r}, named by {self.named_by}"


def look(path: Path, model: str | None, trust_remote_code: bool) -> Trained:
    """Find an adapter's file and check it, without its model.

    Args:
        path: a file that `ll.save` wrote, or the folder of a run that holds one. What a run's result.json says of the
            model and the prompts is used.
        model: the base, as for `load_model`. None: the one that the run or the file names.
        trust_remote_code: whether the model's own code will be run.

    Raises:
        FileNotFoundError, CheckpointError: no such file, or one that is damaged or no adapter's.
        RunError: a folder without adapter, or code to be trusted of a model that only the file names.
    """
    where = expanded(path)
    place = Place(where if where.is_dir() else where.parent, resume=False, overwrite=False)
    if where.is_dir():
        where = place.adapter
        if not where.is_file():
            raise RunError(
                f"{place.out} holds no {where.name}: give a file that ll.save wrote, or the folder of a finished run"
            )
    found = describe(where)
    record = _record(place.result) if where == place.adapter else {}
    trained = [(model, "--model"), (_part(record, "run", "model", str), str(place.result)), (_base(found), "the file")]
    base, named_by = next((name, by) for name, by in trained if name)
    if trust_remote_code and model is None:
        raise RunError(
            f"--trust-remote-code would run code of {base!r}, which {named_by} names, and anybody may have written "
            "that: give the model with --model as well"
        )
    return Trained(where, found, base, named_by, _form(record))


def open_model(
    trained: Trained,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    trust_remote_code: bool,
    name: str = "default",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base with the adapter on it, under that name, and its tokenizer. Options: as for `load_model`.

    Raises:
        ModelError: no such model. CheckpointError, BaseMismatchError: it is not the adapter's base.
    """
    try:
        model, tokenizer = load_model(trained.base, dtype, device, quantization, trust_remote_code)
    except ModelError as error:
        hint = f"\nThat is its name in {trained.named_by}; if it has another one here, give that with --model"
        raise ModelError(f"{error}{'' if trained.named_by == '--model' else hint}") from error
    put_on(model, trained, name)
    return model, tokenizer


def put_on(model: torch.nn.Module, trained: Trained, name: str) -> None:
    """Load the adapter onto its base. Raises CheckpointError, BaseMismatchError: it is not the adapter's base."""
    try:
        ll.load(model, trained.where, name)
    except CheckpointError as error:
        raise type(error)(
            f"{error}. The model here is {trained.base!r}, named by {trained.named_by}; the file calls its base "
            f"{_base(trained.found)!r}: give the right one with --model"
        ) from error


def _base(found: Mapping[str, Any]) -> str:
    """What the file calls its base; the embedded model by the name that commands know it by."""
    name = str(found["base"]["name"])
    return EMBEDDED if name == CONVERSION else name


def _record(path: Path) -> dict[str, Any]:
    """What a run's result.json holds; nothing where there is none, or none that can be read."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _part(record: Mapping[str, Any], outer: str, inner: str, kind: type) -> Any:
    """A value within a record, if it is there and of that kind."""
    part = record.get(outer)
    value = part.get(inner) if isinstance(part, dict) else None
    return value if isinstance(value, kind) else None


def _form(record: Mapping[str, Any]) -> PromptForm | None:
    prompts = _part(record, "data", "prompts", dict) or {}
    instruction, chat = prompts.get("instruction"), prompts.get("chat")
    return PromptForm(instruction, chat) if isinstance(instruction, str) and isinstance(chat, bool) else None
