"""Pictures of a study: the Pareto front, labels that keep apart, and figures that leave the process as it was."""

import dataclasses
import io
import re

import matplotlib
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image

import page_studies as studies
from lora_lite.lab import numerals
from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.numerals import Interval
from lora_lite.lab.report import columns
from lora_lite.lab.report.page import bars, drawing, panels, plots
from lora_lite.lab.report.page.front import points_of
from lora_lite.lab.report.page.plots import Plots, plot

FEW = {arm: studies.ARMS[arm] for arm in ("lora", "ia3", "antipasto", "antipasto_asvd")}


@pytest.fixture(scope="module")
def few() -> Findings:
    return studies.whole(FEW)


@pytest.fixture(scope="module")
def drawn(few: Findings) -> Plots:
    return plot(few)


def test_pictures_and_table_give_the_same_sizes(few: Findings) -> None:
    by_label = {column.label: column for column in columns.columns(few)}
    sketches = {sketch.title: sketch for sketch in bars.costs(few)}
    for label, title in {"peak memory": "Peak memory of training", "file": "Size of the file"}.items():
        for arm in few.arms:
            shown = by_label[label].cell(arm).text
            assert shown.endswith(("MB", "GB", "kB")) and f"{arm.arm} {shown}" in sketches[title].alt


def test_the_caption_names_front_neighbours_and_what_is_left_out(few: Findings, drawn: Plots) -> None:
    caption = drawn.scatters[0].caption
    assert "(ia3, antipasto_asvd, lora)" in caption
    assert "Not separated from the front either: antipasto." in caption
    without = dataclasses.replace(few.arms[0], accuracy=None)
    points = points_of(findings := dataclasses.replace(few, arms=(without, *few.arms[1:])), "macs_token")
    left_out = plots.scatter(findings, "accuracy-macs", points, drawing.empty()).caption
    assert f"left out: {without.arm}." in left_out


def test_a_picture_takes_its_colours_from_the_page_and_has_words(drawn: Plots) -> None:
    pictures = [picture.svg for kind in (drawn.curves, drawn.rates, drawn.costs) for picture in kind]
    pictures += [svg for its in (drawn.overview, *drawn.scatters) for svg in (its.wide, its.narrow)]
    assert len(pictures) == len(FEW) * 2 + len(bars.MEASURES) + 6
    ids: list[str] = []
    for svg in pictures:
        assert svg.startswith('<svg class="chart') and 'role="img" aria-label="' in svg
        assert "var(--ink)" in svg or "var(--muted)" in svg
        assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode cannot change"
        own = re.findall(r' id="([^"]+)"', svg)
        assert set(re.findall(drawing.REFERENCE, svg)) == set(own)
        ids += own
    assert len(ids) == len(set(ids))


def test_pictures_are_the_same_whatever_the_user_set_and_leave_it_so(few: Findings, drawn: Plots) -> None:
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "path", "axes.facecolor": "black"}
    ):
        before = dict(matplotlib.rcParams)
        again = plot(few)
        assert dict(matplotlib.rcParams) == before
    assert again == drawn
    assert not Gcf.get_all_fig_managers()  # nothing is left in pyplot's hands


def test_nothing_measured_is_said_in_every_file() -> None:
    empty = plot(studies.nothing())
    assert (empty.curves, empty.rates, empty.costs) == ((), (), ())
    assert {scatter.wide + scatter.narrow for scatter in empty.scatters} == {""}
    assert len(set(empty.files.values())) == 1
    for data in empty.files.values():
        assert Image.open(io.BytesIO(data)).size == (1280, 240)


def test_one_arm_costs_nothing(few: Findings) -> None:
    arm = few.arms[0]
    assert arm.cost is not None
    free = dataclasses.replace(arm, cost=dataclasses.replace(arm.cost, trainable=0, macs_token=0))
    alone = plot(dataclasses.replace(few, arms=(free,), base=None))
    assert all(scatter.wide for scatter in alone.scatters)
    assert "log scale" not in alone.scatters[0].wide
    assert len(alone.curves) == 1


def test_failed_and_endless_rates_are_crosses(few: Findings) -> None:
    arm = dataclasses.replace(few.arms[0], rates={1e-3: 0.5, 1e-2: None, 1e-1: float("inf")}, rate=1e-3, edge="lowest")
    (sketch,) = panels.rates(dataclasses.replace(few, arms=(arm,)))
    assert "0.01 failed, 0.1 failed; chosen 0.001" in sketch.alt and sketch.note == "lowest rate tried"
    axes = drawing.axes(drawing.canvas(200, 150), 30, 20, 5, 5)
    sketch.draw(axes)
    assert [line.get_marker() for line in axes.lines].count("X") == 2


def test_a_curve_is_thinned_without_losing_its_ends() -> None:
    steps, losses = panels.binned(np.linspace(3.0, 1.0, 5000))
    assert len(steps) == panels.BINS
    assert losses[0] == pytest.approx(3, abs=0.02) and losses[-1] == pytest.approx(1, abs=0.02)
    assert steps[0] < 50 and steps[-1] > 4950


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (numerals.percent(0.6234), "62.3%"),
        (numerals.points(-0.0214), "−2.1"),
        (numerals.points(0.0214), "+2.1"),
        (numerals.points(-0.00001), "0.0"),
        (numerals.signed(0.0123), "+0.012"),
        (numerals.compact(4_884_480), "4.88M"),
        (numerals.compact(999_950), "1.00M"),
        (numerals.compact(49_920), "49.9k"),
        (numerals.compact(910_000), "910k"),
        (numerals.compact(12), "12"),
        (numerals.size(19_700_000), "19.7 MB"),
        (numerals.size(512), "512 B"),
        (numerals.tidy("5.00M"), "5M"),
        (numerals.tidy("800 MB"), "800 MB"),
        (numerals.tidy("0 B"), "0"),
        (numerals.tidy("0.000 s"), "0"),
        (numerals.loss(-4.862), "−4.862"),
        (numerals.span(Interval(2.661, -4.862, 10.184), numerals.loss), "−4.862 to 10.184"),
        (numerals.ratio(-0.5), "−0.50×"),
        (numerals.seconds(-1.5), "−1.500 s"),
        (numerals.short(-0.25), "−0.25"),
        (numerals.short(1.234e-5), "1.23e−05"),
        (numerals.p_value(2e-10), "p < 0.001"),
        (numerals.p_value(0.0031), "p = 0.003"),
        (numerals.p_value(0.0832), "p = 0.083"),
        (numerals.p_value(0.04996), "p = 0.04996"),
        (numerals.p_value(0.0504), "p = 0.050"),
        (numerals.p_value(0.2324), "p = 0.23"),
        (numerals.p_value(1.0), "p = 1"),
        (numerals.rate(5e-5), "5e−5"),
        (numerals.rate(0.002), "0.002"),
        (numerals.seconds(0.0344), "0.034 s"),
        (numerals.seconds(143.2), "143 s"),
        (numerals.span(Interval(0, -0.031, 0.012), numerals.points), "−3.1 to +1.2"),
    ],
)
def test_numbers(shown: str, text: str) -> None:
    assert shown == text
