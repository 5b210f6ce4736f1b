"""What the page says in sentences: how much is measured, how the arms compare, and what their numbers cover."""

from collections import Counter

from lora_lite.lab.findings.findings import Findings

MANY = 1 / 3  # this share of arms at the edge of their grids puts the comparison in doubt


def measured(findings: Findings) -> str:
    """How much of the study is there."""
    arms = findings.arms
    done, wanted = sum(len(arm.seeds) for arm in arms), sum(arm.wanted_seeds for arm in arms)
    with_accuracy = sum(arm.accuracy is not None for arm in arms)
    return (
        f"{with_accuracy} of {len(arms)} arm{'s' * (len(arms) > 1)} measured, {done} of {wanted} seeds at the chosen "
        f"rates, on {findings.items:,} test items."
    )


def counted(findings: Findings) -> str:
    """How the arms compare with the baseline, and how many of a kind have their rate at the grid's edge."""
    others = [arm for arm in findings.arms if arm.verdict != "baseline"]
    if not others:
        return ""
    words = {
        "better": "better",
        "worse": "worse",
        "tie": "not separated from it",
        "": "not comparable yet, which needs two seeds of both",
    }
    verdicts = Counter(arm.verdict for arm in others)
    edges = Counter(arm.verdict for arm in others if arm.edge)
    parts = [
        f"{count} {words[verdict]}" + (f" ({edges[verdict]} at the grid's edge)" if edges[verdict] else "")
        for verdict in words
        if (count := verdicts[verdict])
    ]
    hidden = [100 * arm.seen for arm in others if arm.verdict == "tie" and arm.seen is not None]
    saw = ""
    if hidden:
        low, high = (f"{end:.1f}" for end in (min(hidden), max(hidden)))
        ends = low if low == high else f"{low} to {high} (by arm)"
        saw = f" A tie would have been a verdict, 80 times of 100, from {ends} points on."
    return f"Against {findings.baseline}, of {len(others)} other arm{'s' * (len(others) > 1)}: {', '.join(parts)}.{saw}"


def edges(findings: Findings) -> str:
    """How many arms have their rate at the grid's edge, whether the baseline is among them, and what that means."""
    tuned = {arm.arm: arm.edge for arm in findings.arms if arm.rate is not None}
    at_edge = [arm for arm, edge in tuned.items() if edge]
    if not at_edge:
        return ""
    own = findings.baseline in at_edge
    among = "" if own and len(at_edge) == 1 else ", is among them" if own else ", is not among them"
    text = (
        f"{len(at_edge)} of {len(tuned)} tuned arm{'s' * (len(tuned) > 1)} ({findings.baseline}, the baseline{among}) "
        "did best at the lowest or the highest learning rate tried: a better one may lie beyond."
    )
    if own or len(at_edge) >= MANY * len(tuned):
        text += " So differences may be of the grid rather than of the methods."
    return text


def covered(findings: Findings) -> str:
    """What the intervals of accuracies cover."""
    known = [arm for arm in findings.arms if arm.accuracy is not None]
    single = [arm.arm for arm in known if len(arm.seeds) == 1]
    if not single:
        return "For accuracy it covers seeds and test items: another draw of either."
    items = "test items only: another seed may give another number"
    if len(single) == len(known):
        return f"For accuracy it covers {items}, for each arm has one seed."
    return f"For accuracy it covers seeds and test items; for arms with one seed ({', '.join(single)}), {items}."
