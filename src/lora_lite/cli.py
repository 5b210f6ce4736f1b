"""The command line: `lora-lite list` and `lora-lite train`.

Exit codes: 0 done; 1 the run failed, and the message says where and how to mend it; 2 the command line was not
understood; 130 interrupted. The last line that `train` prints on standard output is one line of JSON.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import lora_lite as ll
from lora_lite.adapter import Adapter

LAB_HINT = "the command line needs the lab's packages: pip install 'lora-lite[lab]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own arguments); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="lora-lite",
        description="Small adapters for frozen models: list the methods, or train one and see what it changes.",
        epilog="Start with: lora-lite train --preset demo lora. Each command explains itself: lora-lite train --help",
    )
    parser.add_argument("--version", action="version", version=f"lora-lite {ll.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,train}")
    listing = commands.add_parser("list", help="the methods, with what the registry knows of each")
    listing.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("train", add_help=False, help="fine-tune an adapter, and measure it before and after")
    if arguments[:1] == ["train"]:
        return train_command(arguments[1:])
    known = parser.parse_args(arguments)
    print(list_json() if known.json else list_table())
    return 0


def facts(cls: type[Adapter]) -> dict[str, Any]:
    """What the registry knows of a method, as plain data."""
    cfg = cls.Config()
    return {
        "title": cls.title,
        "arxiv": cls.arxiv,
        "acts": f"{cls.acts()} W",
        "affine": cls.affine,
        "trained": cls.trained,
        "needs": sorted(cls.needs(cfg)),
        "identity_bound": cls.identity_bound(cfg),
        "lr": cls.lr,
        "lr_range": list(cls.lr_range),
        "config": {key: value for key, value in cfg.to_dict().items() if key not in cfg.unused},
    }


def list_json() -> str:
    """The registry as JSON."""
    return json.dumps({name: facts(cls) for name, cls in ll.variants().items()}, indent=1)


def list_table() -> str:
    """The registry as a table for people."""
    row = "{:<16} {:<11} {:<9} {:<7} {:<5} {:<10} {:<24} {}"
    lines = [row.format("method", "arXiv", "acts", "merges", "data", "at attach", "learning rate (range)", "title")]
    for name, cls in ll.variants().items():
        known = facts(cls)
        low, high = known["lr_range"]
        start = "exact" if known["identity_bound"] == 0 else f"<= {known['identity_bound']:.0e}"
        merges, data = ("yes" if known["affine"] else "no"), ("yes" if known["needs"] else "no")
        rates = f"{known['lr']:g} ({low:g} to {high:g})" if known["trained"] else "not trained"
        lines.append(row.format(name, known["arxiv"], known["acts"], merges, data, start, rates, cls.title))
    return "\n".join([*lines, "", "Settings of a method: lora-lite train METHOD --help"])


def train_command(arguments: Sequence[str]) -> int:
    """Parse the flags of `train`, run it, and print the report and the line of JSON."""
    # Said by packages that transformers imports because they are installed; nothing here uses them.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        import transformers

        from lora_lite.lab import flags, report
        from lora_lite.lab.run import finetune
    except ModuleNotFoundError as error:
        print(f"lora-lite: {error}; {LAB_HINT}", file=sys.stderr)
        return 1
    transformers.utils.logging.disable_progress_bar()
    try:
        run, method, training = flags.parse(arguments)
        result = finetune(run, method, training)
    except (ll.LoraLiteError, ValueError, OSError) as error:
        print(f"lora-lite: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "lora-lite: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    report.show(result)
    print(json.dumps(result.summary, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
