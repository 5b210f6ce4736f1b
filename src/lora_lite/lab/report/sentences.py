"""The words of a report: what was found, in a sentence; caveats; settings, machines, gaps and failures, line by line.

Terminal, Markdown and page take every sentence about findings from here, so that they say the same.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_lite.lab import numerals
from lora_lite.lab.findings.findings import BASE, Failure, Finding, Findings, Machine, Missing
from lora_lite.lab.numerals import percent

CUT_OFF = 0.1  # share of replies cut off from which a caveat says so
NAMED = 5  # arms that a sentence names one by one
VERDICTS = {  # verdict -> what the table says
    "baseline": "◆ baseline",
    "better": "▲ better",
    "worse": "▼ worse",
    "tie": "● tie",
    "": "needs two seeds",
}
LEGEND = {  # verdict -> what a picture's legend says, given the baseline
    "baseline": "{}, the baseline",
    "better": "better than {}",
    "worse": "worse than {}",
    "tie": "cannot be told apart from {}",
    "": "needs two seeds to compare",
}


def decision(findings: Findings) -> str:
    """What the study says, first of all: that nothing was learnt, if so, or how the arms compare with the baseline."""
    arms = [arm for arm in findings.arms if arm.accuracy]
    if not arms:
        return "Nothing is measured yet."
    base = findings.base.accuracy if findings.base else None
    if base and not findings.learnt:
        who = f"no arm answers clearly more of the {findings.items:,} test items correctly"
        alone = "the arm does not answer clearly more of the test items correctly"
        return (
            f"Nothing was learnt: {who if len(arms) > 1 else alone} than the frozen base, which answers "
            f"{percent(base.mean)}. So the numbers below do not say which method is better. Train longer, try other "
            "learning rates, or choose an easier task."
        )
    frozen = f"; the frozen base, {percent(base.mean)}" if base else ""
    own = next((arm.accuracy for arm in arms if arm.arm == findings.baseline), None)
    if own is None:
        return f"{findings.baseline}, the baseline, is not measured yet, so nothing can be compared with it."
    return " ".join([f"{findings.baseline} answers {percent(own.mean)} of the test items correctly{frozen}.",
                     *compared(findings)])  # fmt: skip


def compared(findings: Findings) -> list[str]:
    """How the other arms compare with the baseline; nothing where there are none."""
    others = [arm for arm in findings.arms if arm.verdict != "baseline"]
    if not others:
        return []
    of = {verdict: [arm.arm for arm in others if arm.verdict == verdict] for verdict in VERDICTS}
    parts = [f"{counted(of['better'])} better" if of["better"] else "none is better"]
    parts += [f"{counted(of['worse'])} worse"] if of["worse"] else []
    parts += [f"{len(of['tie'])} cannot be told apart from it"] if of["tie"] else []
    parts += [f"{len(of[''])} cannot be compared yet"] if of[""] else []
    if len(others) == 1:
        [one] = others
        words = {"better": "is better", "worse": "is worse", "tie": "cannot be told apart from it"}
        return [f"{one.arm} {words.get(one.verdict, 'cannot be compared yet: that takes two seeds of both')}."]
    return [f"Of the {len(others)} other arms, {listed(parts)}."]


def counted(names: Sequence[str]) -> str:
    """ "4 (dora, ia3, hra and road) are"."""
    several = f"{len(names)} ({listed(names)})" if len(names) <= NAMED else str(len(names))
    return f"{names[0]} is" if len(names) == 1 else f"{several} are"


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def caveats(findings: Findings) -> tuple[str, ...]:
    """A sentence for each weakness that shows in the findings, those of the task first."""
    made = (one_seed, not_learnt, ties, edges, cut_off, unlike_machines, unscored)
    return (*findings.task_notes, *filter(None, (sentence(findings) for sentence in made)))


def one_seed(findings: Findings) -> str:
    """Which arms have one seed, and what their intervals leave out."""
    alone = [arm.arm for arm in findings.arms if len(arm.seeds) == 1]
    if not alone:
        return ""
    return (
        f"Measured with one seed: {', '.join(alone)}. These intervals cover the test items alone: another seed may "
        "land far outside. An arm is called better or worse only once it and the baseline have two seeds each."
    )


def not_learnt(findings: Findings) -> str:
    """Which arms are not clearly above the base, where others are."""
    behind = [arm.arm for arm in findings.arms if arm.accuracy and arm.arm not in (findings.learnt or ())]
    if not findings.learnt or not behind:
        return ""
    return f"Not clearly above the frozen base: {', '.join(behind)}. Their intervals overlap with the base's."


def ties(findings: Findings) -> str:
    """What differences the ties could have hidden."""
    seen = [arm.seen for arm in findings.arms if arm.verdict == "tie"]
    known = [100 * share for share in seen if share is not None]
    blind = len(seen) - len(known)
    parts = []
    if known:
        low, high = f"{min(known):.1f}", f"{max(known):.1f}"
        ends = low if low == high else f"{low} to {high}"
        parts.append(
            f"a true difference of {ends} points (for each arm, the number after 'sees') would have been found in "
            "80 of 100 such studies"
        )
    if blind:
        parts.append(f"for {blind} arm{'s' * (blind > 1)} no difference would have been, however large")
    if not parts:
        return ""
    return f"A tie does not mean equal: {'; '.join(parts)}. Smaller differences can be missed. More seeds find them."


def edge(arm: Finding) -> str:
    """That an arm's best rate is an end of its grid, in three words; "" where it is not."""
    return f"{arm.edge} rate tried" if arm.edge else ""


def edge_tip(arm: Finding) -> str:
    """The same, and what it means."""
    return f"the {arm.edge} learning rate tried was the best: a better one may lie beyond" if arm.edge else ""


def edges(findings: Findings) -> str:
    """How many arms have their rate at the grid's edge, whether the baseline is among them, and what that means."""
    tuned = [arm for arm in findings.arms if arm.rate is not None]
    at = {end: [arm.arm for arm in tuned if arm.edge == end] for end in ("lowest", "highest")}
    names = [name for ends in at.values() for name in ends]
    if not names:
        return ""
    which = "; ".join(f"{end}: {', '.join(ends)}" for end, ends in at.items() if ends)
    return (
        f"{len(names)} of {len(tuned)} arms did best at the lowest or the highest learning rate tried ({which}), the "
        f"baseline {'' if findings.baseline in names else 'not '}among them. A better rate may lie beyond, so a "
        "difference may come from the learning rates tried rather than from the methods."
    )


def cut_off(findings: Findings) -> str:
    """Whether many replies were cut off before they could give an answer."""
    shares = {arm.arm: arm.cut_off for arm in findings.arms if arm.cut_off is not None and arm.cut_off > CUT_OFF}
    if not shares:
        return ""
    parts = ", ".join(f"{name} {percent(share, 0)}" for name, share in shares.items())
    return (
        f"Replies cut off at the longest length allowed: {parts}. An answer that would have come later counts as "
        "wrong; --max-new-tokens allows longer replies."
    )


def unlike_machines(findings: Findings) -> str:
    """Whether times were measured under unequal conditions."""
    if len(findings.cost_devices) < 2:
        return ""
    return (
        f"Costs were measured on different machines or settings ({'; '.join(findings.cost_devices)}): do not compare "
        "seconds, tokens a second, memory or ratios of times between arms."
    )


def unscored(findings: Findings) -> str:
    """Whether the task's own verifier failed on replies."""
    if not findings.unscored:
        return ""
    of = f"{findings.unscored:,} of {findings.replies:,} replies"
    return f"The task's own verifier failed on {of}, which count as wrong."


def covered(findings: Findings) -> str:
    """What the intervals of accuracies cover."""
    known = [arm for arm in findings.arms if arm.accuracy is not None]
    single = [arm.arm for arm in known if len(arm.seeds) == 1]
    if not single:
        return "For accuracy it covers seeds and test items: another draw of either."
    items = "test items only: another seed may give another number"
    if len(single) == len(known):
        return f"For accuracy it covers {items}, because each arm has one seed."
    return f"For accuracy it covers seeds and test items; for arms with one seed ({', '.join(single)}), {items}."


def measured(findings: Findings) -> str:
    """How much of the study is there."""
    arms = findings.arms
    done, wanted = sum(len(arm.seeds) for arm in arms), sum(arm.wanted_seeds for arm in arms)
    with_accuracy = sum(arm.accuracy is not None for arm in arms)
    return f"{with_accuracy} of {len(arms)} arm{'s' * (len(arms) > 1)} measured, {done} of {wanted} seeds"


def task_name(task: str) -> str:
    """A task by its plain name, without parameters: "gcd:max_value=100" -> "gcd"; a file by its own name."""
    path = re.search(r"^jsonl:(?:.*,)?path=([^,]+)", task)
    name = Path(path[1] if path else task.partition(":")[0]).name or task
    return name if path or "." in name else name.replace("_", " ")


def headline(findings: Findings) -> str:
    """What was measured, in a line."""
    quantised = "" if findings.quantization == "none" else f", {findings.quantization}"
    return (
        f"{findings.name}: {findings.model} ({findings.dtype}{quantised}) on {task_name(findings.task)}, "
        f"{findings.items:,} test items, {findings.steps:,} steps of {findings.batch_size}"
    )


def setup(findings: Findings) -> dict[str, str]:
    """Settings to show, label -> value."""
    its = findings.setup
    own = f", but {', '.join(its.own_targets)} choose their own" if its.own_targets else ""
    times = {}
    if its.workload is not None:
        rows, tokens, rounds = its.workload
        times["times and memory"] = (
            f"{rows} x {tokens} random tokens, medians of {rounds} rounds, the base and the arm in turns; no other run "
            "of the study at the same time"
        )
    return {
        "task": findings.task,
        "training examples": f"{its.examples:,}{left_out(its.too_long, its.empty)}",
        "validation examples": f"{its.validation_examples:,}",
        "learning rates": f"{its.rates} for each arm, {its.rate_ratio:g} times apart, around {its.rate_factor:g} times "
        "the method's default",
        "schedule": f"warm-up {its.warmup:.0%}, cosine to {its.final_rate:.0%}, gradients clipped to {its.clip:g}",
        "seeds": f"{its.seeds}, after one for tuning",
        "longest example": f"{its.longest_example:,} tokens",
        "longest reply": f"{its.longest_reply:,} tokens",
        "layers": "all" if its.layers is None else ", ".join(map(str, its.layers)),
        "targets": ", ".join(its.targets) + own,
        **times,
        "fingerprints": "; ".join(f"{part} {digest}" for part, digest in its.fingerprints.items()),
    }


def left_out(too_long: int, empty: int) -> str:
    """How many examples were left out, and why."""
    words = [f"{count:,} {why}" for count, why in ((too_long, "too long"), (empty, "empty")) if count]
    return f" (left out: {', '.join(words)})" if words else ""


def machine(its: Machine) -> str:
    """What runs ran on, in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in its.versions.items())
    commit = (its.commit or "not a checkout") + ("+changes" if its.changes else "")
    runs = f"{its.runs} run{'s' * (its.runs > 1)}"
    return f"{runs}: {its.device}, {its.system}; {versions}; commit {commit}"


def lacks(missing: Missing | None) -> list[str]:
    """What is not there yet of an arm, or of the base."""
    if missing is None:
        return []
    if missing.arm == BASE:
        return ["not measured yet"]
    words = [f"learning rates {', '.join(map(numerals.rate, missing.rates))} not tried yet"] if missing.rates else []
    words += ["every learning rate failed"] if missing.all_rates_failed else []
    words += [f"seeds {', '.join(map(str, missing.seeds))} not measured yet"] if missing.seeds else []
    return words + (["costs not measured yet"] if missing.costs else [])


def missing(findings: Findings) -> tuple[str, ...]:
    """What the study still lacks, a line for each arm."""
    return tuple(f"{who(each.arm)}: {'; '.join(lacks(each))}" for each in findings.missing)


def failed(failure: Failure) -> str:
    """A run that failed, and why."""
    kinds = {"rate": "learning rate {:g}: ", "seed": "seed {:g}: ", "costs": "costs: "}
    return f"{who(failure.arm)}: {kinds.get(failure.run, '').format(failure.value)}{failure.reason}"


def failures(findings: Findings) -> tuple[str, ...]:
    """Every run that failed, and why."""
    return tuple(map(failed, findings.failures))


def who(arm: str) -> str:
    """An arm, or the base, at the beginning of a line."""
    return "the frozen base" if arm == BASE else arm


def beneath(findings: Findings) -> tuple[str, ...]:
    """The lines below a table on a terminal."""
    lines: Iterable[str] = (f"missing: {line}" for line in missing(findings))
    return (*caveats(findings), *lines, *(f"failed: {line}" for line in failures(findings)))
