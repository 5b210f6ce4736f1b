"""From a ledger to findings: what a study found so far, and what it lacks. Data only: no sentence is made here."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lora_lite as ll
from lora_lite.lab.findings import circumstances, estimates
from lora_lite.lab.findings.findings import BASE, Change, Cost, Failure, Finding, Findings, Item, Missing, Reply
from lora_lite.lab.numerals import Interval
from lora_lite.lab.scoring.scoring import RIGHT
from lora_lite.lab.studies.arms import Arm
from lora_lite.lab.studies.ledger import DONE, FAILED, Ledger, LedgerError, read_json, run_id
from lora_lite.lab.studies.plan import chosen_rates, job_config, read_plan
from lora_lite.lab.studies.study import Job

EXAMPLES = 12
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """How an arm stands against the baseline: the fields of the same names of `Finding`."""

    verdict: str = ""
    against: Interval | None = None
    alone: Interval | None = None
    p: float | None = None
    seen: float | None = None


def analyse(folder: Path) -> Findings:
    """What the results in a folder say. Raises `LedgerError` if there are none, or a file is damaged."""
    return Analysis(folder).findings()


class Analysis:
    """A folder of results, with the study that it answers."""

    def __init__(self, folder: Path) -> None:
        self.study, self.plan = read_plan(folder)
        self.ledger = Ledger(folder)
        self.read = functools.cache(self.ledger.figures)  # each file once, whatever other processes add meanwhile
        self.arms = self.study.arms()
        self.rates = chosen_rates(self.study, self.plan, self.ledger)
        self.base = self.of(Job("base"))
        self.seeds = {arm.name: self._seeds(arm) for arm in self.arms}
        self.scores = {
            name: {seed: correct(record) for seed, record in records.items() if record["status"] == DONE}
            for name, records in self.seeds.items()
        }
        self.errors = estimates.Errors(self.scores)
        self.compared = self.errors.against(self.study.reference)
        places = estimates.places(self.scores, self.errors)
        self.places = {arm: place for arm, place in places.items() if self.scores[arm]}

    def of(self, job: Job) -> Record | None:
        """The record of a job, if it is done."""
        return self.read(run_id(job_config(self.study, job, self.plan)))

    def _seeds(self, arm: Arm) -> dict[int, Record]:
        if (rate := self.rates.get(arm.name)) is None:
            return {}
        records = {seed: self.of(Job("seed", arm, rate, seed)) for seed in range(1, self.study.seeds + 1)}
        return {seed: record for seed, record in records.items() if record is not None}

    def standing(self, name: str) -> Standing:
        """How an arm stands against the baseline."""
        reference = self.study.reference
        if name == reference:
            return Standing("baseline")
        if (compared := self.compared.get(name)) is not None:
            change = "better" if compared.joint.mean > 0 else "worse"
            verdict = change if compared.decided else "tie"
            return Standing(verdict, compared.joint, compared.alone, compared.p, compared.seen)
        table, base = self.scores[name], self.scores[reference]
        if not table or not base:
            return Standing()
        return Standing(against=estimates.of_items(estimates.stack(table), estimates.stack(base)))

    def findings(self) -> Findings:
        """All of it."""
        study, everyone = self.study, len(self.arms)
        arms = [self.finding(arm) for arm in self.arms]
        arms.sort(key=lambda each: (*(each.places or (everyone + 1, everyone + 1)), each.arm))
        replies, unscored = circumstances.scored(self.records())
        return Findings(
            name=study.name, about=study.about, task=study.task, model=study.model, quantization=study.quantization,
            dtype=self.plan["dtype"], baseline=study.reference, items=self.items(), steps=study.training.steps,
            batch_size=study.training.batch_size, setup=circumstances.setup(study, self.plan), base=self.bare_base(),
            arms=tuple(arms), examples=self.examples(), machines=circumstances.machines(self.records()),
            command=self.plan["command"], task_notes=tuple(self.plan["sources"]["notes"]), replies=replies,
            unscored=unscored, cost_devices=circumstances.devices(self.costs()), base_failure=failure(self.base),
        )  # fmt: skip

    def items(self) -> int:
        """How many test items the runs were measured on: as asked for, or fewer where the task has no more."""
        return self.plan["sources"].get("examples", {}).get("test", self.study.test_examples)

    def records(self) -> list[Record]:
        """The records that the study is made of."""
        tunes = [self.of(Job("tune", arm, lr)) for arm in self.arms for lr in self.study.grid(arm)]
        seeds = [record for records in self.seeds.values() for record in records.values()]
        return [record for record in (self.base, *tunes, *seeds, *self.costs()) if record is not None]

    def costs(self) -> list[Record]:
        """The records of the costs that the study asks for."""
        records = [self.of(Job("cost", arm)) for arm in self.arms] if self.study.costs else []
        return [record for record in records if record is not None]

    def bare_base(self) -> Finding | None:
        """The bare base, as an arm without seeds; None before it is measured."""
        record = self.base
        if record is None or record["status"] == FAILED:
            return None
        losses = record["losses_after"]
        return Finding(
            arm=BASE, method=BASE, title="", arxiv="", seeds=(), wanted_seeds=0, rates={}, rate=None, edge="",
            accuracy=estimates.accuracy(correct(record)[None]), by_seed={}, against=None, verdict="", p=None,
            places=None, mentioned=record["mentioned"], cut_off=record["cut_off"],
            validation_loss=point(losses["validation"]), curves={},
            forgetting={name: Change(loss, point(loss)) for name, loss in losses.items() if name != "validation"},
            cost=None,
        )  # fmt: skip

    def finding(self, arm: Arm) -> Finding:
        """What is known of an arm."""
        study, table, standing = self.study, self.scores[arm.name], self.standing(arm.name)
        tried = {lr: self.of(Job("tune", arm, lr)) for lr in study.grid(arm)}
        rate = self.rates.get(arm.name)
        records = [self.seeds[arm.name][seed] for seed in sorted(table)]
        cls = ll.methods()[arm.method.split("+")[0]]
        return Finding(
            arm=arm.name, method=arm.method, title=cls.facts.title, arxiv=cls.facts.arxiv, seeds=tuple(sorted(table)),
            wanted_seeds=study.seeds, rates=losses_by_rate(tried), rate=rate, edge=edge(study.grid(arm), rate),
            accuracy=self.accuracy(arm.name),
            by_seed={seed: float(scores.mean()) for seed, scores in sorted(table.items())},
            against=standing.against, verdict=standing.verdict, p=standing.p, places=self.places.get(arm.name),
            mentioned=mean(records, "mentioned"), cut_off=mean(records, "cut_off"),
            validation_loss=over(records, "validation"),
            curves={seed: list(self.seeds[arm.name][seed]["curve"]) for seed in sorted(table)},
            forgetting=self.forgetting(records), cost=self.cost(arm, records or [r for r in tried.values() if r]),
            alone=standing.alone, seen=standing.seen, failures=self.failures(arm, tried),
            missing=self.lacks(arm, tried) or None,
        )  # fmt: skip

    def accuracy(self, name: str) -> Interval | None:
        """The mean accuracy of an arm; of one seed, its interval covers items alone."""
        if name in self.errors.tables:
            return self.errors.accuracy(name)
        return estimates.accuracy(estimates.stack(self.scores[name])) if self.scores[name] else None

    def forgetting(self, records: list[Record]) -> dict[str, Change]:
        """Losses elsewhere: those of the bare base, and those with the trained adapter."""
        before = self.base["losses_after"] if self.base and self.base["status"] == DONE else {}
        names = [name for name in before if name != "validation"]
        return {name: Change(before[name], after) for name in names if (after := over(records, name)) is not None}

    def cost(self, arm: Arm, records: list[Record]) -> Cost | None:
        """The measured costs; before they are measured, what the training runs show."""
        record = self.of(Job("cost", arm))
        if record is not None and record["status"] == DONE:
            return as_cost(record["cost"])
        done = [record for record in records if record["status"] == DONE]
        return Cost(done[0]["trainable"], done[0]["stored_bytes"]) if done else None

    def lacks(self, arm: Arm, tried: Mapping[float, Record | None]) -> Missing:
        """What the study asks of an arm and is not there."""
        rates = tuple(lr for lr, record in tried.items() if record is None)
        wanted, costs = range(1, self.study.seeds + 1), self.study.costs
        return Missing(
            arm.name,
            rates,
            all_rates_failed=not rates and self.rates[arm.name] is None,
            seeds=tuple(seed for seed in wanted if seed not in self.seeds[arm.name]),
            costs=costs and self.of(Job("cost", arm)) is None,
        )

    def failures(self, arm: Arm, tried: Mapping[float, Record | None]) -> tuple[Failure, ...]:
        """The runs of an arm that failed."""
        runs: list[tuple[str, float | None, Record | None]] = [("rate", lr, record) for lr, record in tried.items()]
        runs += [("seed", seed, record) for seed, record in self.seeds[arm.name].items()]
        runs.append(("costs", None, self.of(Job("cost", arm))))
        failures = (failure(record, arm.name, kind, value) for kind, value, record in runs)
        return tuple(each for each in failures if each is not None)

    def examples(self) -> tuple[Item, ...]:
        """Items from the hardest to the easiest, with the replies of every arm's first seed."""
        first = {name: records[min(table)] for name, records in self.seeds.items() if (table := self.scores[name])}
        if self.base is not None and self.base["status"] == DONE:
            first = {BASE: self.base, **first}
        if not first:
            return ()
        items = read_json(self.ledger.data / f"{self.plan['prints']['test']}.json")
        if any(len(record["scores"]) != len(items) for record in first.values()):
            raise LedgerError(f"{self.ledger.data} does not hold the items that the runs were measured on")
        difficulty = np.mean([correct(record) for record in first.values()], axis=0)
        order = np.argsort(difficulty, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).round().astype(int))]
        replies = [
            tuple(Reply(name, run["completions"][i], run["scores"][i]) for name, run in first.items()) for i in chosen
        ]
        return tuple(Item(items[i][0], items[i][1], given) for i, given in zip(chosen, replies, strict=True))


def correct(record: Record) -> np.ndarray:
    """0/1 for each item (I,)."""
    return (np.asarray(record["scores"], dtype=float) >= RIGHT).astype(float)


def point(value: float) -> Interval:
    """A value that is exact: nothing about the base is random."""
    return Interval(value, value, value)


def mean(records: list[Record], key: str) -> float | None:
    """The mean of a figure over runs; None without any."""
    return float(np.mean([record[key] for record in records])) if records else None


def over(records: list[Record], loss: str) -> Interval | None:
    """A loss over seeds; None without any."""
    values = [record["losses_after"][loss] for record in records if loss in record["losses_after"]]
    return estimates.loss(values) if values else None


def edge(grid: list[float], rate: float | None) -> str:
    """Which end of the grid the chosen rate is."""
    if rate is None or len(grid) == 1:
        return ""
    return {grid[0]: "lowest", grid[-1]: "highest"}.get(rate, "")


def losses_by_rate(tried: Mapping[float, Record | None]) -> dict[float, float | None]:
    """Rate -> validation loss, None where the run failed; rates not tried are left out."""
    return {
        lr: record["losses_after"]["validation"] if record["status"] == DONE else None
        for lr, record in tried.items()
        if record is not None
    }


def failure(record: Record | None, arm: str = BASE, run: str = "base", value: float | None = None) -> Failure | None:
    """A run's failure, if it failed."""
    if record is None or record["status"] != FAILED:
        return None
    return Failure(arm, run, record["reason"], value)


def as_cost(measured: Record) -> Cost:
    """Costs as the ledger holds them, with intervals made whole again."""
    values = {key: value for key, value in measured.items() if key in Cost.__dataclass_fields__}
    spans = {key: Interval(**values[key]) for key in ("forward", "step") if values.get(key)}
    return Cost(**{**values, **spans})
