"""The command line: `lora-lite list`, `lora-lite inspect-file`, and the commands of the lab.

Exit codes: 0 done; 1 it failed, and the message says where and how to fix it; 2 the command line was not understood;
130 interrupted. With --json the last line on standard output is one line of JSON.
"""

import argparse
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_lite.errors import LoraLiteError
from lora_lite.printable import printable
from lora_lite.version import __version__

if TYPE_CHECKING:  # nothing here may import torch: --help would wait for it
    from lora_lite.adapter import Adapter

LAB_HINT = "the command line needs the lab's packages: pip install 'lora-lite[lab]'"


class Command(NamedTuple):
    """A command of the lab: the function of its name in a module of lab/commands. It explains itself with --help.

    about: a line for `lora-lite --help`. interrupted: what to do after an interruption.
    """

    module: str
    about: str
    interrupted: str


LAB = {
    "train": Command(
        "commands",
        "fine-tune an adapter and measure it before and after; --probe: does this method work on this model?",
        "the same command with --resume goes on from the last checkpoint",
    ),
    "generate": Command("talk", "replies of a trained adapter, at one coefficient or several", "nothing was written"),
    "chat": Command("talk", "talk to a trained adapter", "nothing was written"),
    "export": Command("ship", "an adapter as a folder that peft, vLLM and others load", "nothing was written"),
    "merge": Command("ship", "a model with the adapter merged, which transformers loads alone", "nothing was written"),
    "combine": Command("combine", "one adapter's file made of several", "nothing was written"),
    "bench": Command(
        "commands",
        "compare methods with equal budgets; may be stopped and resumed at any moment",
        "the same command goes on where it stopped",
    ),
    "study": Command(
        "commands", "run one of the library's own comparisons", "the same command goes on where it stopped"
    ),
    "cost": Command("commands", "what methods cost on a model, without training", "nothing was written"),
    "report": Command(
        "commands", "a page, pictures and a table of a bench or study", "nothing was measured; start it again"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own arguments); returns the exit code."""
    own = argparse.ArgumentParser(prog="lora-lite", add_help=False, allow_abbrev=False)
    own.add_argument("--import", dest="imports", action="append", default=[], metavar="FILE")
    asked, arguments = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="lora-lite",
        description="Small adapters for frozen models: list the methods, train one, talk to it, ship it, compare them.",
        epilog="Every command takes --json, and --import my_method.py (again for more), which makes your own methods "
        "and bases known. Start with: lora-lite train --preset demo lora. Each command explains itself: lora-lite "
        "train --help",
    )
    parser.add_argument("--version", action="version", version=f"lora-lite {__version__}")
    names = ["list", *LAB, "inspect-file"]
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(names)}}}")
    listing = commands.add_parser("list", help="the methods, with what the registry knows of each")
    listing.add_argument("--json", action="store_true", help="as JSON, with titles and settings")
    for name, command in LAB.items():
        commands.add_parser(name, add_help=False, help=command.about)
    inspect = commands.add_parser("inspect-file", help="what an adapter's file holds, without its model")
    inspect.add_argument("adapter", help="a file that lora_lite.save wrote")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    known = None if arguments and arguments[0] in LAB else parser.parse_args(arguments)
    for path in asked.imports:
        try:
            run_file(path)
        except Exception as error:  # whatever the file does
            print(printable(f"lora-lite: --import {path}: {type(error).__name__}: {error}"), file=sys.stderr)
            return 1
    if known is None:
        return lab_command(arguments[0], arguments[1:], asked.imports)
    if known.command == "inspect-file":
        return inspect_file(known.adapter, known.json)
    print(list_json() if known.json else list_table())
    return 0


def run_file(path: str) -> None:
    """Run a file of one's own, which registers methods and bases. What lies beside it can be imported by it."""
    where = Path(path).expanduser().resolve()
    if not where.is_file():
        raise FileNotFoundError("there is no such file")

    sys.path.append(str(where.parent))
    spec = importlib.util.spec_from_file_location(str(where), where, loader=SourceFileLoader(str(where), str(where)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(where)] = module  # where dataclasses look for a class's own module
    spec.loader.exec_module(module)


def inspect_file(path: str, as_json: bool) -> int:
    """Say what an adapter's file holds; the exit code."""
    from lora_lite.files.description import as_text, describe

    try:
        contents = describe(Path(path).expanduser())
    except (LoraLiteError, OSError) as error:
        return failed(error)
    print(json.dumps(contents, sort_keys=True) if as_json else printable(as_text(contents)))
    return 0


def failed(error: Exception) -> int:
    """Say what went wrong, in a line; the exit code."""
    hint = " (one of your own? give --import FILE)" if "unknown method" in str(error) else ""
    print(printable(f"lora-lite: {type(error).__name__}: {error}{hint}"), file=sys.stderr)
    return 1


def methods() -> "dict[str, type[Adapter]]":
    """The registered methods; the first call imports torch."""
    import lora_lite as ll

    return ll.methods()


def facts(cls: "type[Adapter]") -> dict[str, Any]:
    """What the registry knows of a method, as plain data."""
    cfg = cls.Config()
    return {
        "title": cls.facts.title,
        "arxiv": cls.facts.arxiv,
        "acts": f"{cls.acts()} W",
        "affine": cls.facts.affine,
        "trained": cls.facts.trained,
        "needs": sorted(cls.needs(cfg)),
        "identity_bound": cls.identity_bound(cfg),
        "lr": cls.facts.lr,
        "lr_range": list(cls.facts.lr_range),
        "config": {key: value for key, value in cfg.to_dict().items() if key not in cfg.unused},
    }


def list_json() -> str:
    """The registry as JSON."""
    return json.dumps({name: facts(cls) for name, cls in methods().items()}, indent=1)


def list_table() -> str:
    """The registry as a table for people, in 80 columns."""
    row = "{:<16} {:<10} {:<6} {:<6} {:<4} {:<7} {}"
    lines = [row.format("method", "arXiv", "acts", "merges", "data", "start", "learning rate (range)")]
    for name, cls in methods().items():
        known = facts(cls)
        low, high = known["lr_range"]
        start = "exact" if known["identity_bound"] == 0 else f"{known['identity_bound']:.0e}"
        merges, data = ("yes" if known["affine"] else "no"), ("yes" if known["needs"] else "no")
        rates = f"{known['lr']:g} ({low:g} to {high:g})" if known["trained"] else "not trained"
        lines.append(row.format(name, known["arxiv"], cls.acts(), merges, data, start, rates))
    legend = """
acts: before or after the layer's weight. data: whether attaching needs some.
start: whether a fresh adapter leaves the model as it is, or by how much not.
Settings of a method: lora-lite train METHOD --help; titles: list --json"""
    return "\n".join([*lines, legend])


def lab_command(name: str, arguments: Sequence[str], imports: Sequence[str] = ()) -> int:
    """Run a command of the lab; its exit code. What it raises on purpose becomes a line, not a traceback."""
    # Said by packages that transformers imports because they are installed; nothing here uses them.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import transformers

        from lora_lite.lab.shared_flags import Shared

        module = importlib.import_module(f"lora_lite.lab.commands.{LAB[name].module}")
    except ModuleNotFoundError as error:
        print(f"lora-lite: {error}; {LAB_HINT}", file=sys.stderr)
        return 1
    transformers.utils.logging.disable_progress_bar()
    flags = argparse.ArgumentParser(prog=f"lora-lite {name}", add_help=False, allow_abbrev=False)
    flags.add_argument("--json", action="store_true")
    asked, rest = flags.parse_known_args(list(arguments))
    try:
        return getattr(module, name)(rest, Shared(asked.json, tuple(imports)))
    except (LoraLiteError, ValueError, OSError) as error:
        return failed(error)
    except KeyboardInterrupt:
        print(f"lora-lite: interrupted; {LAB[name].interrupted}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
