"""Arms as points of cost and accuracy, and which of them no other beats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.numerals import Interval


@dataclass(frozen=True)
class Point:
    """An arm in a scatter."""

    arm: str
    verdict: str
    cost: float
    accuracy: Interval


def points_of(findings: Findings, field: str) -> list[Point]:
    """The arms with both an accuracy and this field of `Cost`."""
    points = []
    for arm in findings.arms:
        cost = getattr(arm.cost, field, None)
        if arm.accuracy is not None and cost is not None and math.isfinite(arm.accuracy.mean):
            points.append(Point(arm.arm, arm.verdict, float(cost), arm.accuracy))
    return points


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, gain) no other point beats: by no higher cost and no lower gain, one of them strictly so.

    Returns their indices by rising cost. It compares estimates: whether two points are separated is another question.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        best = front[-1] if front else None
        if best is None or points[index][1] > points[best][1] or points[index] == points[best]:
            front.append(index)
    return front


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals share a value."""
    return one.low <= other.high and other.low <= one.high


def front_of(points: Sequence[Point]) -> tuple[list[int], list[int]]:
    """Indices of the front, and of the points off it whose interval no point of the front at no higher cost clears."""
    front = pareto([(point.cost, point.accuracy.mean) for point in points])
    near = []
    for index, point in enumerate(points):
        rivals = [points[at].accuracy for at in front if points[at].cost <= point.cost]
        if index not in front and all(rival.low <= point.accuracy.high for rival in rivals):
            near.append(index)
    return front, near
