"""Flags of `lora-lite train`, made by tyro from the config dataclasses: a new method's settings need no line here."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import docstring_parser
import tyro

import lora_lite as ll
from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.lab.shared_flags import EVERYWHERE
from lora_lite.lab.tasks.gym import EXAMPLES
from lora_lite.lab.training.config import RunConfig
from lora_lite.lab.training.presets import PRESETS
from lora_lite.lab.training.progress import TrainConfig
from lora_lite.peft_names import advice

PROG = "lora-lite train"
DESCRIPTION = (
    """Fine-tune an adapter on a frozen language model, and measure it on held-out items before and after.

Flags may stand before or after the method; a preset sets them all, and others change it from there:
    lora-lite train --preset demo dora
    lora-lite train --model Qwen/Qwen3-0.6B-Base --task gsm_symbolic --steps 300 lora --r 16
The adapter, checkpoints and result.json go to --out; --resume goes on after an interruption.
Exit code: 0 done, 1 failed, 2 flags not understood, 130 interrupted.
"""
    + EVERYWHERE
)
# Set for all methods at once: the seed by --seed; adapters stay in fp32 whatever the base is.
COMMON = ("dtype", "seed")


def parse(arguments: Sequence[str]) -> tuple[RunConfig, AdapterConfig, TrainConfig]:
    """What the flags ask for. Exits with code 2 on flags that cannot be understood, with 0 after --help."""
    first = argparse.ArgumentParser(add_help=False, prog=PROG)
    first.add_argument("--preset", choices=sorted(PRESETS), default="none")
    preset, rest = first.parse_known_args(list(arguments))
    chosen = PRESETS[preset.preset]
    for word in rest:
        if word in ll.methods() and not ll.methods()[word].facts.trained:
            first.error(f"{word} is not trained: attach it with calibration_data=ll.Contrast(positive, negative)")
    trained = {name: cls for name, cls in ll.methods().items() if cls.facts.trained}
    methods = {name: method_flags(cls, chosen.methods.get(name, {})) for name, cls in trained.items()}
    named = next((word for word in rest if word in methods), chosen.method)
    union = tyro.extras.subcommand_type_from_defaults(
        {name: flags() for name, flags in methods.items()},
        descriptions={name: f"{cls.facts.title} (arXiv:{cls.facts.arxiv})" for name, cls in trained.items()},
        prefix_names=False,
    )
    Train = dataclasses.make_dataclass(
        "Train",
        [
            ("run", RunConfig, dataclasses.field(default=chosen.run)),
            ("training", TrainConfig, dataclasses.field(default=chosen.training_of(ll.methods()[named]))),
            ("method", union, dataclasses.field(default=methods[chosen.method]())),
        ],
    )
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
    description = f"{DESCRIPTION}\nPresets (--preset NAME): " + "; ".join(f"{k}: {v.about}" for k, v in PRESETS.items())
    try:
        parsed: Any = tyro.cli(Train, args=rest, prog=PROG, description=description, config=style)
    except SystemExit as stopped:
        for hint in (
            hints(rest, {name: flags for name, flags in methods.items() if name == named}) if stopped.code else ()
        ):
            print(f"{PROG}: {hint}", file=sys.stderr)
        raise
    try:
        method = to_config(methods, parsed.method, parsed.training.seed)
    except ValueError as error:
        first.error(str(error))
    if not (parsed.run.task or parsed.run.probe):
        first.error(f"nothing says what to learn: give --preset demo, or --task {EXAMPLES}")
    return parsed.run, method, parsed.training


def hints(arguments: Sequence[str], methods: Mapping[str, type]) -> list[str]:
    """What may have been meant by flags and methods that do not exist, a line each."""
    classes = (RunConfig, TrainConfig, *methods.values())
    known = [field.name for flags in classes for field in dataclasses.fields(flags)]
    lines = []
    for word in arguments:
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--") and name.removeprefix("no_") not in known and (hint := advice(name, known, "--{}")):
            lines.append(f"there is no {word.split('=')[0]}; {hint}")
    if not any(word in ll.methods() for word in arguments):
        for word in arguments:
            near = difflib.get_close_matches(word, ll.methods(), n=3)
            near.sort(key=lambda name: sorted(name) != sorted(word))  # letters that changed places come first
            if near and not word.startswith("-"):
                lines.append(f"there is no method {word!r}; did you mean {near[0]}?")
    return lines


def to_config(methods: Mapping[str, type], values: Any, seed: int) -> AdapterConfig:
    """The adapter config that the parsed flags of a method stand for."""
    cls = next(ll.methods()[name] for name, flags in methods.items() if type(values) is flags)
    defaults = {field.name: field.default for field in dataclasses.fields(cls.Config)}
    given = {key: value for key, value in dataclasses.asdict(values).items() if value != defaults[key]}
    return cls.Config(seed=seed, **given)


def method_flags(cls: type[Adapter], defaults: Mapping[str, Any]) -> type:
    """A dataclass of a method's settings, with its docstrings as help; unused fields and COMMON ones left out."""
    texts = field_help(cls.Config)
    kept = [f for f in dataclasses.fields(cls.Config) if f.name not in (*cls.Config.unused, *COMMON)]
    return dataclasses.make_dataclass(
        cls.Config.__name__,
        [
            (
                f.name,
                Annotated[str if isinstance(f.default, str) else f.type, tyro.conf.arg(help=texts[f.name])],
                defaults.get(f.name, f.default),
            )
            for f in kept
        ],
        frozen=True,
        namespace={"__doc__": f"{cls.facts.title}."},
    )


def field_help(config: type[AdapterConfig]) -> dict[str, str]:
    """Field name -> its line in the `Args` of the docstrings of the config and its base classes."""
    texts = {field.name: "" for field in dataclasses.fields(config)}
    for base in reversed(config.__mro__):
        for parameter in docstring_parser.parse(base.__doc__ or "").params:
            texts[parameter.arg_name] = " ".join((parameter.description or "").split())
    return texts
