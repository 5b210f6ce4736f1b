"""What a reader has to know before believing a study's numbers, in sentences made from what it found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_lite.lab.findings import Finding


def caveats(arms: Sequence[Finding], baseline: str, costs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence for each weakness that shows in the findings. costs: the records of runs that measured costs."""
    return tuple(filter(None, (seeds(arms), edges(arms, baseline), machines(costs))))


def seeds(arms: Sequence[Finding]) -> str:
    """Whether seeds are too few to say anything of others."""
    alone = [arm.arm for arm in arms if len(arm.seeds) == 1]
    if not alone:
        return ""
    return (
        f"Measured with one seed: {', '.join(alone)}. There the interval covers test items alone, another seed may "
        "land far from it, and nothing is called better or worse before two seeds are in common."
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


def machines(costs: Iterable[Mapping[str, Any]]) -> str:
    """Whether times were measured under unequal conditions."""
    found = [record["provenance"] for record in costs]
    where = dict.fromkeys(f"{each['device']} ({each['threads']} threads)" for each in found)
    if len(where) < 2:
        return ""
    return (
        f"Costs were measured on different machines or settings ({'; '.join(where)}): seconds, tokens a second, memory "
        "and ratios of times are not comparable between arms."
    )
