"""The command line: `lora-lite list | train | bench | study | cost | report`.

Exit codes: 0 done; 1 it failed, and the message says where and how to mend it; 2 the command line was not understood;
130 interrupted. The last line that a command of the lab prints on standard output is one line of JSON.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_lite.errors import LoraLiteError
from lora_lite.printable import printable
from lora_lite.version import __version__

if TYPE_CHECKING:  # nothing here may import torch: --help would wait for it
    from lora_lite.adapter import Adapter

LAB_HINT = "the command line needs the lab's packages: pip install 'lora-lite[lab]'"


LAB = {  # command -> help; each is the function of that name in lab/commands.py, and explains itself with --help
    "train": "fine-tune an adapter and measure it before and after; --probe: does this method work on this model?",
    "bench": "compare methods with equal budgets; may be stopped and resumed at any moment",
    "study": "run one of the library's own comparisons",
    "cost": "what methods cost on a model, without training",
    "report": "a page, pictures and a table of a bench or study",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own arguments); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="lora-lite",
        description="Small adapters for frozen models: list the methods, train one, compare them, see what they cost.",
        epilog="Start with: lora-lite train --preset demo lora. Each command explains itself: lora-lite train --help",
    )
    parser.add_argument("--version", action="version", version=f"lora-lite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{list,{','.join(LAB)}}}")
    listing = commands.add_parser("list", help="the methods, with what the registry knows of each")
    listing.add_argument("--json", action="store_true", help="as JSON")
    for name, text in LAB.items():
        commands.add_parser(name, add_help=False, help=text)
    if arguments and arguments[0] in LAB:
        return lab_command(arguments[0], arguments[1:])
    known = parser.parse_args(arguments)
    print(list_json() if known.json else list_table())
    return 0


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
    """The registry as a table for people."""
    row = "{:<16} {:<11} {:<9} {:<7} {:<5} {:<10} {:<24} {}"
    lines = [row.format("method", "arXiv", "acts", "merges", "data", "at attach", "learning rate (range)", "title")]
    for name, cls in methods().items():
        known = facts(cls)
        low, high = known["lr_range"]
        start = "exact" if known["identity_bound"] == 0 else f"<= {known['identity_bound']:.0e}"
        merges, data = ("yes" if known["affine"] else "no"), ("yes" if known["needs"] else "no")
        rates = f"{known['lr']:g} ({low:g} to {high:g})" if known["trained"] else "not trained"
        lines.append(row.format(name, known["arxiv"], known["acts"], merges, data, start, rates, cls.facts.title))
    return "\n".join([*lines, "", "Settings of a method: lora-lite train METHOD --help"])


def lab_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command of the lab; its exit code. What it raises on purpose becomes a line, not a traceback."""
    # Said by packages that transformers imports because they are installed; nothing here uses them.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import transformers

        from lora_lite.lab.commands import commands
    except ModuleNotFoundError as error:
        print(f"lora-lite: {error}; {LAB_HINT}", file=sys.stderr)
        return 1
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(commands, name)(arguments)
    except (LoraLiteError, ValueError, OSError) as error:
        print(printable(f"lora-lite: {type(error).__name__}: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lora-lite: interrupted; {commands.RESUME[name]}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
