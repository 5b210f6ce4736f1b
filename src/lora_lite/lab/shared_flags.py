"""What several commands share, defined once: flags (a field of such a type is the flag, with its help), names."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

TrustRemoteCode = Annotated[
    bool,
    tyro.conf.arg(
        help="run the code that a model's folder or hub id brings along; without it, a model that needs such code is "
        "refused. It may do whatever you may: give it for models whose code you have read."
    ),
]

EVERYWHERE = (
    "Every command takes --json, which ends its output with one line of JSON, and --import my_method.py (again for "
    "more), which makes your own methods and bases known."
)


@dataclass(frozen=True)
class Shared:
    """The flags of every command. json: whether the output ends with JSON. imports: files of one's own, run already."""

    json: bool = False
    imports: tuple[str, ...] = ()

    def say(self, value: Any) -> None:
        """The last line of output, where it is asked for."""
        if self.json:
            print(json.dumps(value, sort_keys=True).replace("\x7f", r"\u007f"))

    def command(self, name: str, arguments: Sequence[str]) -> str:
        """A command as it would be typed again."""
        own = [word for path in self.imports for word in ("--import", path)]
        return f"lora-lite {name} {shlex.join([*arguments, *own])}"


def slug(name: str, longest: int = 60) -> str:
    """A name as that of a folder: letters, digits, dots and hyphens, in no other folder. May be empty."""
    return re.sub(r"[^\w.-]+", "-", name)[:longest].strip(".-")
