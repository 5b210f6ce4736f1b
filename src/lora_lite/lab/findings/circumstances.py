"""Under which circumstances a study's numbers came about: settings and machines, in words that are ready to show."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lite.lab.costs.measure import Workload
from lora_lite.lab.provenance import where
from lora_lite.lab.studies.study import Study


def machines(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the runs ran on, a line for each combination, with how many."""
    lines: dict[str, int] = {}
    for record in records:
        found = record["provenance"]
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        commit = (found["commit"] or "not a checkout")[:12] + ("+changes" if "+" in (found["commit"] or "") else "")
        line = f"{where(found)}, {found['system']}; {versions}; commit {commit}"
        lines[line] = lines.get(line, 0) + 1
    return tuple(f"{count} runs: {line}" for line, count in lines.items())


def setup(study: Study, plan: Mapping[str, Any]) -> dict[str, str]:
    """Settings to show, label -> value."""
    training, counts = study.training, plan["sources"]["tokens"]
    return {
        "training examples": f"{counts['train']['kept']} ({counts['train']['too_long']} too long, "
        f"{counts['train']['empty']} empty left out)",
        "validation examples": str(counts["validation"]["kept"]),
        "learning rates": f"{study.rates} an arm, {study.rate_ratio:g} times apart, around {study.rate_factor:g} times "
        "the registered default",
        "schedule": f"warm-up {training.warmup:.0%}, cosine to {training.final_lr:.0%}, clip {training.clip:g}",
        "seeds": f"{study.seeds}, after one for tuning",
        "longest example": f"{study.max_length} tokens",
        "longest reply": f"{plan['max_new_tokens']} tokens",
        "layers": "all" if study.layers is None else ", ".join(map(str, study.layers)),
        "targets": targets(study),
        **({"times and memory": workload()} if study.costs else {}),
        "data": "; ".join(f"{part} {digest}" for part, digest in plan["prints"].items()),
    }


def targets(study: Study) -> str:
    """The layers that are adapted, and which arms choose their own."""
    asked = set(study.target_names), set(study.target_roles)
    own = [
        arm.name
        for arm in study.arms()
        if any((set(cfg.target_names), set(cfg.target_roles)) != asked for cfg in arm.configs)
    ]
    common = ", ".join(study.target_names or study.target_roles)
    return f"{common}, but for {', '.join(own)}, which choose their own" if own else common


def workload() -> str:
    """What is run to measure times and memory."""
    size = Workload()
    return (
        f"{size.batch_size} x {size.tokens} random tokens, medians of {size.rounds} rounds in turns with the base; no "
        "other run of the study at the same time"
    )
