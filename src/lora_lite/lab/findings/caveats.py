"""What a reader has to know before believing a study's numbers, in sentences made from what it found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_lite.lab.findings.findings import Finding
from lora_lite.lab.numerals import percent
from lora_lite.lab.provenance import where

MANY = 0.1  # share of replies cut off from which it is said


def caveats(arms: Sequence[Finding], baseline: str, costs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence for each weakness that shows in the findings. costs: the records of runs that measured costs."""
    return tuple(filter(None, (seeds(arms), ties(arms), edges(arms, baseline), unfinished(arms), machines(costs))))


def seeds(arms: Sequence[Finding]) -> str:
    """Whether seeds are too few to say anything of others."""
    alone = [arm.arm for arm in arms if len(arm.seeds) == 1]
    if not alone:
        return ""
    return (
        f"Measured with one seed: {', '.join(alone)}. There the interval covers test items alone, another seed may "
        "land far from it, and nothing is called better or worse before an arm and the baseline have two seeds each."
    )


def ties(arms: Sequence[Finding]) -> str:
    """What differences the ties could have hidden."""
    found = [arm.seen for arm in arms if arm.verdict == "tie"]
    if not found:
        return ""
    known = [share for share in found if share is not None]
    blind = len(found) - len(known)
    parts = []
    if known:
        low, high = (f"{100 * share:.1f}" for share in (min(known), max(known)))
        parts.append(
            f"a true difference of {low if low == high else f'{low} to {high}'} points, by arm (the number after "
            "'sees'), would have been found in 80 of 100 such studies"
        )
    if blind:
        parts.append(f"for {blind} arm{'s' * (blind > 1)} no difference would, however large")
    return (
        f"A tie is not equality: {'; '.join(parts)}. Smaller differences may be real and missed: more seeds find them."
    )


def edges(arms: Sequence[Finding], baseline: str) -> str:
    """Which arms would perhaps have done better beyond the learning rates that were tried."""
    at = {arm.arm: arm.edge for arm in arms if arm.edge}
    if not at:
        return ""
    ends = {end: ", ".join(name for name, its in at.items() if its == end) for end in ("lowest", "highest")}
    which = "; ".join(f"{end}: {names}" for end, names in ends.items() if names)
    return (
        f"{len(at)} of {len(arms)} arms took the lowest or the highest learning rate that was tried ({which}), the "
        f"baseline {'' if baseline in at else 'not '}among them. Such an arm might do better beyond its grid, so a "
        "difference may be one of the grids rather than of the methods."
    )


def unfinished(arms: Sequence[Finding]) -> str:
    """Whether many replies were cut off before they could give an answer."""
    found = {arm.arm: arm.cut_off for arm in arms if arm.cut_off is not None and arm.cut_off > MANY}
    if not found:
        return ""
    shares = ", ".join(f"{name} {percent(share, 0)}" for name, share in found.items())
    return (
        f"Replies that were cut off at the largest number of new tokens: {shares}. An answer that was to come later "
        "counts as wrong; --max-new-tokens sets that number."
    )


def unscored(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Whether the task's own verifier failed on replies. records: of runs; one without a count had none."""
    measured = [record for record in records if "scores" in record]
    failed = sum(record.get("verifier_failures", 0) for record in measured)
    if not failed:
        return ()
    replies = sum(len(record["scores"]) for record in measured)
    return (f"The task's own verifier failed on {failed:,} of {replies:,} replies, which count as wrong.",)


def machines(costs: Iterable[Mapping[str, Any]]) -> str:
    """Whether times were measured under unequal conditions."""
    places = dict.fromkeys(where(record["provenance"]) for record in costs)
    if len(places) < 2:
        return ""
    return (
        f"Costs were measured on different machines or settings ({'; '.join(places)}): seconds, tokens a second, "
        "memory and ratios of times are not comparable between arms."
    )
