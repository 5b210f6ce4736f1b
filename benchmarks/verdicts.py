"""Are the lab's verdicts true? Studies are made up in which the truth is known, and judged.

    python benchmarks/verdicts.py --json results/verdicts.json --before 5f55b48

An item is right where a normal variable passes the threshold of the seed's accuracy: part of it belongs to the item (it
is hard for all arms), part to the item for this arm, the rest is chance; so a seed's accuracy is exactly what it is set
to: the arm's, plus a normal seed effect, kept in [0, 1]. All figures come with their Monte-Carlo error.
--before judges the first of the same studies by `estimates.py` as it was at that commit.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy import stats

from lora_lite.lab.findings import estimates
from lora_lite.lab.provenance import commit, device_name

ITEMS, ITEM_SHARE, ARM_ITEM_SHARE = 128, 0.4, 0.05  # shares of the variance behind an item's being right
FAST_DRAWS = 2000
Study = dict[str, dict[int, np.ndarray]]


@dataclass(frozen=True)
class Condition:
    """Studies of a kind.

    base: accuracy in percent, of all arms, or of the arms in turn; arm 1 is `better` points above it. spread: of seeds,
    in points, likewise. studies: how many; 1,000 leave a standard error of 0.7 points where 5 of 100 are wrong.
    """

    arms: int
    seeds: int
    base: float | tuple[float, ...]
    spread: tuple[float, ...]
    better: float = 0.0
    studies: int = 1000

    def means(self) -> np.ndarray:
        """Every arm's accuracy (A,), as a share."""
        means = np.resize(np.array(self.base, dtype=float), self.arms)
        means[1] += self.better
        return means / 100


def made(condition: Condition, rng: np.random.Generator) -> Study:
    """One study; arm "0" is the baseline."""
    shape = (condition.arms, condition.seeds)
    spread = np.resize(np.array(condition.spread) / 100, condition.arms)[:, None]
    cut = stats.norm.ppf(np.clip(condition.means()[:, None] + spread * rng.normal(size=shape), 0, 1))
    latent = np.sqrt(ITEM_SHARE) * rng.normal(size=ITEMS)
    latent = latent + np.sqrt(ARM_ITEM_SHARE) * rng.normal(size=(condition.arms, 1, ITEMS))
    latent = latent + np.sqrt(1 - ITEM_SHARE - ARM_ITEM_SHARE) * rng.normal(size=(*shape, ITEMS))
    right = (latent < cut[:, :, None]).astype(float)
    return {str(arm): dict(enumerate(table)) for arm, table in enumerate(right)}


def judged(study: Study, truth: np.ndarray, draws: int = FAST_DRAWS) -> dict[str, float]:
    """What today's code says of a study. truth: arms' differences to the baseline, (A - 1,)."""
    errors = estimates.Errors(study, draws)
    found = list(errors.against("0").values())
    null = truth == 0
    wrong = np.array([each.decided for each in found])
    covered = {
        kind: [
            getattr(each, kind).low <= true <= getattr(each, kind).high for each, true in zip(found, truth, strict=True)
        ]
        for kind in ("alone", "joint")
    }
    places = set(estimates.places(study, errors).values())
    return {
        "wrong verdict": float(wrong[null].any()),
        "found": float(wrong[0]),
        "pair separated": float(places != {(1, len(study))}),
        "alone covers": float(np.mean(covered["alone"])),
        "all joint cover": float(np.all(covered["joint"])),
    }


@functools.cache
def dunnett(arms: int, freedom: int) -> float:
    """What the largest |t| of all comparisons with a baseline passes 5 times of 100, where one variance holds."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(400_000, arms)) / np.sqrt(rng.chisquare(freedom, size=(400_000, 1)) / freedom)
    return float(np.quantile(np.abs(means[:, 1:] - means[:, :1]).max(axis=1) / np.sqrt(2), 0.95))


def pooled(study: Study, truth: np.ndarray) -> dict[str, float]:
    """A plain pooled t-test of the arms' accuracies over seeds, by Dunnett."""
    table = np.array([[scores.mean() for scores in arm.values()] for arm in study.values()])
    arms, seeds = table.shape
    error = np.sqrt(2 * table.var(axis=1, ddof=1).mean() / seeds)
    found = np.abs(table[1:].mean(axis=1) - table[0].mean()) > dunnett(arms, arms * (seeds - 1)) * error
    return {"wrong verdict": float(found[truth == 0].any()), "found": float(found[0])}


def at_commit(revision: str) -> Callable[[Study, np.ndarray], dict[str, float]]:
    """What the code of a commit, before `Errors`, says of a study."""
    path = "src/lora_lite/lab/findings/estimates.py"
    source = subprocess.run(["git", "show", f"{revision}:{path}"], capture_output=True, text=True, check=True).stdout
    old = types.ModuleType("estimates_before")
    sys.modules[old.__name__] = old
    exec(compile(source, path, "exec"), old.__dict__)

    def judge(study: Study, truth: np.ndarray) -> dict[str, float]:
        differences = {name: old.shared(table, study["0"]) for name, table in study.items() if name != "0"}
        adjusted = old.holm({name: old.of_items(table).p for name, table in differences.items()})
        intervals = {name: old.paired(table) for name, table in differences.items()}
        wrong = np.array([adjusted[name] < 0.05 and intervals[name].excludes(0.0) for name in differences])
        covers = [each.low <= true <= each.high for each, true in zip(intervals.values(), truth, strict=True)]
        places = set(old.places(study).values())
        return {
            "wrong verdict": float(wrong[truth == 0].any()), "found": float(wrong[0]),
            "pair separated": float(places != {(1, len(study))}), "alone covers": float(np.mean(covers)),
        }  # fmt: skip

    return judge


Judge = Callable[[Study, np.ndarray], dict[str, float]]


def measure(condition: Condition, judge: Judge, seed: int, studies: int) -> dict[str, dict[str, float]]:
    """Figure -> its mean over studies, in percent, with its Monte-Carlo standard error."""
    rng = np.random.default_rng(seed)
    truth = condition.means()[1:] - condition.means()[0]
    rows = [judge(made(condition, rng), truth) for _ in range(studies)]
    skip = {key for key, without in (("pair separated", truth.any()), ("found", not truth[0])) if without}
    figures = {key: 100 * np.array([row[key] for row in rows]) for key in rows[0] if key not in skip}
    return {
        key: {"percent": round(float(each.mean()), 2), "error": round(float(each.std() / studies**0.5), 2)}
        for key, each in figures.items()
    }


CONDITIONS = [
    *(Condition(17, 3, 40, (spread,)) for spread in (0.0, 4.0, 8.4, 16.0)),
    *(Condition(17, 3, base, (8.4,)) for base in (5, 60)),
    *(Condition(17, seeds, 40, (8.4,)) for seeds in (2, 5, 10)),
    Condition(17, 2, 40, (16.0,)),
    Condition(17, 10, 40, (0.0,)),
    *(Condition(5, seeds, 40, (spread,)) for seeds in (2, 3, 10) for spread in (0.0, 8.4, 16.0)),
    Condition(5, 3, 5, (8.4,)),
    # Unequal spreads, which three seeds hardly show: of half of the arms; of arms near 0%; of the baseline alone.
    Condition(17, 3, 40, (2.0, 12.0)),
    Condition(17, 3, 40, (2, 4, 8, 16)),
    Condition(5, 3, 40, (2, 4, 8, 16)),
    Condition(17, 3, (*(40,) * 9, *(2,) * 8), (*(8.4,) * 9, *(1.0,) * 8)),
    Condition(17, 3, 40, (16.0, *(4.0,) * 16)),
    Condition(5, 5, 40, (16.0, *(4.0,) * 4)),
    # Power.
    Condition(17, 3, 35, (8.4,), 30, studies=3000),
    Condition(17, 3, 52, (8.4,), -30),
    Condition(17, 3, 30, (8.4,), 30),
]


def main() -> None:
    """Run all conditions and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keep the figures here, beside those of other conditions")
    parser.add_argument("--before", help="a commit whose estimates are judged too")
    parser.add_argument("--share", type=float, default=1.0, help="of the studies, for a quick look")
    parser.add_argument("--only", type=int, nargs="+", help="these conditions, by number (their seed), not all")
    options = parser.parse_args()
    judges: dict[str, tuple[Judge, float]] = {"after": (judged, 1.0), "pooled t, Dunnett": (pooled, 1.0)}
    if options.before:
        judges["before"] = (at_commit(options.before), 0.08)
    head, lines, started = head_of(options.before), [], time.time()
    for seed, condition in enumerate(CONDITIONS):
        if options.only is not None and seed not in options.only:
            continue
        found = {}
        for name, (judge, part) in judges.items():
            studies = max(20, int(condition.studies * options.share * part))
            found[name] = {"studies": studies, **measure(condition, judge, seed, studies)}
        lines.append({"seed": seed, **asdict(condition), "found": found})
        print(f"{time.time() - started:5.0f} s", json.dumps(lines[-1]), flush=True)
        if options.json:
            keep(options.json, head, lines)


def head_of(before: str | None) -> dict[str, object]:
    """What the figures hold for: command, code, machine, versions and settings."""
    return {
        "command": f"python benchmarks/verdicts.py --before {before}",
        "commit": commit(),
        "device": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
        "items": ITEMS,
        "item_share": ITEM_SHARE,
        "arm_item_share": ARM_ITEM_SHARE,
        "draws": FAST_DRAWS,
    }


def keep(path: Path, head: dict[str, object], lines: list[dict[str, object]]) -> None:
    """Write the lines, beside those of other conditions that the file has from the same code."""
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before["lines"] if before.get("commit") == head["commit"] else []
    whole = {line["seed"]: line for line in [*kept, *lines]}
    path.write_text(json.dumps({**head, "lines": [whole[seed] for seed in sorted(whole)]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
