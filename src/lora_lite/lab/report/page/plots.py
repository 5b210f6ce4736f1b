"""Every picture of a study: SVG for the page, PNG files beside it."""

from dataclasses import dataclass

from matplotlib.figure import Figure

from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.numerals import percent
from lora_lite.lab.report import sentences
from lora_lite.lab.report.page import bars, drawing, overview, panels
from lora_lite.lab.report.page.front import Point, front_of, points_of
from lora_lite.lab.report.page.scatter import NARROW, WIDE, base_fits, draw_scatter

AXES = {  # name of the file -> field of Cost, label
    "accuracy-parameters": ("trainable", "trained parameters"),
    "accuracy-macs": ("macs_token", "added multiply-accumulates a token"),
}


@dataclass(frozen=True)
class Picture:
    """A picture for wide and for narrow windows, as SVG (both empty if nothing is measured), and words."""

    file: str
    title: str
    wide: str
    narrow: str
    caption: str


@dataclass(frozen=True)
class Plots:
    """All pictures of a study. files: name of a PNG -> its bytes."""

    overview: Picture
    scatters: tuple[Picture, ...]
    curves: tuple[panels.Panel, ...]
    rates: tuple[panels.Panel, ...]
    costs: tuple[panels.Panel, ...]
    files: dict[str, bytes]


def plot(findings: Findings) -> Plots:
    """Draw everything. What is not measured yet is said in its picture's place."""
    scatters, files = [], {}
    with drawing.style():
        first, files["accuracy.png"] = outcome(findings)
        for name in AXES:
            field, label = AXES[name]
            points = points_of(findings, field)
            wide = draw_scatter(findings, label, points, WIDE) if points else drawing.empty()
            files[f"{name}.png"] = drawing.png(wide)
            scatters.append(scatter(findings, name, points, wide))
        curves, files["learning-curves.png"] = panels.panels(panels.curves(findings), "curves", columns=6)
        rates, files["rates.png"] = panels.panels(panels.rates(findings), "rates", columns=6)
        costs, files["costs.png"] = panels.panels(bars.costs(findings), "costs", columns=3)
    return Plots(first, tuple(scatters), curves, rates, costs, files)


def outcome(findings: Findings) -> tuple[Picture, bytes]:
    """The accuracies of all arms: the picture of the page's head, and the same as a PNG."""
    file, title = "accuracy.png", "Accuracy of each arm"
    if not overview.rows(findings):
        return Picture(file, title, "", "", ""), drawing.png(drawing.empty())
    alt = f"{title}, with 95% intervals; the numbers are in the table. {sentences.decision(findings)}"
    figures = {"wide": overview.draw(findings, WIDE[0]), "narrow": overview.draw(findings, NARROW[0])}
    png = drawing.png(figures["wide"])
    drawn = {kind: drawing.svg(figure, f"accuracy-{kind}", alt, f"chart {kind}") for kind, figure in figures.items()}
    return Picture(file, title, drawn["wide"], drawn["narrow"], ""), png


def scatter(findings: Findings, name: str, points: list[Point], wide: Figure) -> Picture:
    """The scatter for both kinds of windows, with a caption that claims no more than the intervals do."""
    title = f"Accuracy against {AXES[name][1]}"
    if not points:
        return Picture(f"{name}.png", title, "", "", "No arm has both an accuracy and this cost yet.")
    front, near = front_of(points)
    named = ", ".join(points[index].arm for index in front)
    caption = (
        f"Bars are 95% intervals. The line is the Pareto front of the estimates ({named}): no other arm has both a "
        "higher estimate and a lower cost. It is dashed between arms whose intervals overlap: those are not separated, "
        "and their order may be chance."
    )
    if near:
        caption += f" Not separated from the front either: {', '.join(points[index].arm for index in near)}."
    if left_out := [arm.arm for arm in findings.arms if arm.arm not in {point.arm for point in points}]:
        caption += f" Not measured yet, and left out: {', '.join(left_out)}."
    caption += " Points stand at their costs; bars of arms that cost nearly the same stand a few pixels aside of them."
    if single := [arm.arm for arm in findings.arms if arm.accuracy is not None and len(arm.seeds) == 1]:
        caption += f" With one seed, the bars of {', '.join(single)} cover test items only."
    if findings.base and findings.base.accuracy and not base_fits(findings, points):
        caption += f" The frozen base, at {percent(findings.base.accuracy.mean)}, lies outside the picture."
    alt = f"{title}: {len(points)} arms; the numbers are in the table. On the Pareto front: {named}."
    figures = {"wide": wide, "narrow": draw_scatter(findings, AXES[name][1], points, NARROW)}
    drawn = {kind: drawing.svg(figure, f"{name}-{kind}", alt, f"chart {kind}") for kind, figure in figures.items()}
    return Picture(f"{name}.png", title, drawn["wide"], drawn["narrow"], caption)
