"""Under which circumstances a study's numbers came about: its settings, and the machines of its runs."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_lite.lab.costs.measure import Workload
from lora_lite.lab.findings.findings import Machine, Setup
from lora_lite.lab.provenance import where
from lora_lite.lab.studies.study import Study

Record = Mapping[str, Any]


def machines(records: Sequence[Record]) -> tuple[Machine, ...]:
    """What the runs ran on, once each, with how many."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for record in records:
        origin = record["provenance"]
        counts[where(origin), origin["system"], tuple(origin["versions"].items()), origin["commit"] or ""] += 1
    return tuple(
        Machine(runs, device, system, dict(versions), commit.partition("+")[0][:12], "+" in commit)
        for (device, system, versions, commit), runs in counts.items()
    )


def devices(records: Iterable[Record]) -> tuple[str, ...]:
    """What the runs ran on, without versions."""
    return tuple(dict.fromkeys(where(record["provenance"]) for record in records))


def scored(records: Iterable[Record]) -> tuple[int, int]:
    """Replies of all runs, and those of them that the task's own verifier failed on; a run without a count had none."""
    measured = [record for record in records if "scores" in record]
    return (
        sum(len(record["scores"]) for record in measured),
        sum(record.get("verifier_failures", 0) for record in measured),
    )


def setup(study: Study, plan: Record) -> Setup:
    """The settings that all arms share."""
    training, counts, work = study.training, plan["sources"]["tokens"], Workload()
    return Setup(
        examples=counts["train"]["kept"], too_long=counts["train"]["too_long"], empty=counts["train"]["empty"],
        validation_examples=counts["validation"]["kept"], rates=study.rates, rate_ratio=study.rate_ratio,
        rate_factor=study.rate_factor, warmup=training.warmup, final_rate=training.final_lr, clip=training.clip,
        seeds=study.seeds, longest_example=study.max_length, longest_reply=plan["max_new_tokens"],
        layers=study.layers, targets=study.target_names or study.target_roles, own_targets=own_targets(study),
        workload=(work.batch_size, work.tokens, work.rounds) if study.costs else None,
        fingerprints=dict(plan["prints"]),
    )  # fmt: skip


def own_targets(study: Study) -> tuple[str, ...]:
    """The arms that choose their layers themselves."""
    asked = set(study.target_names), set(study.target_roles)
    return tuple(
        arm.name
        for arm in study.arms()
        if any((set(cfg.target_names), set(cfg.target_roles)) != asked for cfg in arm.configs)
    )
