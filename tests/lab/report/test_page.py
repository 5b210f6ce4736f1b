"""The page of a study, opened in headless Chromium: no request, no error, and it says what is there and what is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser

import page_studies as studies
from lora_lite.lab.findings.findings import Findings
from lora_lite.lab.report import sentences
from lora_lite.lab.report.page import write_page
from page_browser import STUDIES, opened, page_folders, shared_browser  # noqa: F401


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", STUDIES)
def test_it_opens_without_errors_and_fits(browser: Browser, folders: dict[str, Path], name: str, width: int) -> None:
    with opened(browser, folders[name], width) as page:
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        beyond = """width => [...document.querySelectorAll('body *')].filter(each =>
            !each.closest('.scroll') && !each.parentElement.closest('svg')
            && each.getBoundingClientRect().right > width + 0.5)
            .map(each => each.outerHTML.slice(0, 200))"""
        assert page.evaluate(beyond, width) == []
        assert page.locator("svg.chart:visible").count() == page.locator("svg.chart[aria-label]:visible").count()


@pytest.mark.slow
@pytest.mark.parametrize("make", [studies.whole, studies.many])
def test_big_studies_fit_and_no_label_covers_another(browser: Browser, tmp_path: Path, make: Callable) -> None:
    study = make()
    write_page(study, tmp_path)
    for width in (1280, 390):
        labels_apart(browser, tmp_path, width, study)


def labels_apart(browser: Browser, folder: Path, width: int, study: Findings) -> None:
    with opened(browser, folder, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for index in range(2):
            texts = page.locator(".scatter").nth(index).locator("svg:visible text")
            boxes = texts.evaluate_all(
                """(texts, arms) => texts.filter(text => arms.includes(text.textContent))
                .map(text => text.getBoundingClientRect())
                .map(box => [box.left, box.top + 2, box.right, box.bottom - 2])""",
                [arm.arm for arm in study.arms],
            )
            assert len(boxes) >= len(study.arms)  # the baseline's name is no label of its own in the legend
            for at, (left, top, right, bottom) in enumerate(boxes):
                for other in boxes[at + 1 :]:
                    assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]


def test_examples_are_filtered(browser: Browser, folders: dict[str, Path]) -> None:
    study: Findings = STUDIES["whole"]()
    replies = [reply for item in study.examples for reply in item.replies]
    with opened(browser, folders["whole"]) as page:
        shown = page.locator(".reply:not([hidden])")
        assert shown.count() == len(replies)
        page.select_option("#example-outcome", "wrong")
        assert shown.count() == sum(reply.score < 1 for reply in replies) > 0
        page.select_option("#example-arm", "dora")
        wanted = [reply for reply in replies if reply.arm == "dora" and reply.score < 1]
        assert shown.count() == len(wanted)
        count = page.locator("#example-count").inner_text()
        assert count == f"{len(wanted)} {'reply' if len(wanted) == 1 else 'replies'}"
        page.select_option("#example-outcome", "right")
        assert page.locator(".item:visible").count() == len([r for r in replies if r.arm == "dora" and r.score == 1])


def test_pictures_fit_a_telephone_and_change_with_the_window(browser: Browser, folders: dict[str, Path]) -> None:
    for width, kind in ((390, "narrow"), (1280, "wide")):
        with opened(browser, folders["whole"], width) as page:
            assert page.locator(f".scatter svg.{kind}:visible").count() == 2
            assert page.locator(".scatter svg.chart:visible").count() == 2
            sizes = page.locator(".scatter svg:visible text, .gallery svg text").evaluate_all(
                """texts => texts.map(text => parseFloat(getComputedStyle(text).fontSize)
                * text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width)"""
            )
            assert len(sizes) > 50 and min(sizes) >= 8.5


def test_dark_mode_reaches_the_pictures(browser: Browser, folders: dict[str, Path]) -> None:
    """Every text in a picture stands out from the page in both schemes (contrast 4.5 or more)."""
    script = """() => {
        const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(part => part / 255)
            .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
        const paper = light(getComputedStyle(document.body).backgroundColor);
        const shown = 'svg text, td, td small, th, figcaption, summary';
        return [paper, ...[...document.querySelectorAll(shown)].map(each => {
            const style = getComputedStyle(each);
            const own = light(each.closest('svg') ? style.fill : style.color);
            return (Math.max(own, paper) + 0.05) / (Math.min(own, paper) + 0.05);
        })];
    }"""
    papers = []
    for scheme in ("light", "dark"):
        with opened(browser, folders["whole"], scheme=scheme) as page:
            paper, *contrasts = page.evaluate(script)
            papers.append(paper)
            assert len(contrasts) > 200 and min(contrasts) >= 4.5
    assert papers[0] > 0.9 and papers[1] < 0.05


def test_what_comes_from_outside_is_text(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["nasty"]) as page:
        assert page.evaluate("window.attacked") is None
        assert page.locator("h1").inner_text().startswith("</script><script>window.attacked = true</script>")
        assert page.locator("script").count() == 1 and page.locator("img").count() == 0
        links = page.locator("a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
        assert links and all(
            link.startswith(("https://arxiv.org/abs/", "#")) or link.endswith(".png") for link in links
        )
        assert page.locator(".reply i").inner_text() == "(empty reply)"
        assert "ia3[target_names=('<b>$k$</b>',)]" in page.locator(".gallery").first.inner_text()


def test_what_is_missing_is_said(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["partial"]) as page:
        assert page.locator(".missing li").all_text_contents() == list(sentences.missing(studies.partial()))
        assert "1 of 3 arms measured, 3 of 9 seeds" in page.locator("caption").inner_text()
        assert "No cost is measured yet." in page.locator("main").inner_text()
    with opened(browser, folders["whole"]) as page:
        failed = page.locator(".failures li").all_text_contents()
        assert failed == ["hra: learning rate 0.0006: LoraLiteError: not finite at step 41"]
        assert page.locator(".missing").count() == 0
        assert "Of the 5 other arms, none is better" in page.locator(".decision").inner_text()


def test_files_are_replaced_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("old")
    paths = write_page(studies.nothing(), tmp_path)
    assert [path.name for path in paths] == [
        "index.html",
        "accuracy.png",
        "accuracy-parameters.png",
        "accuracy-macs.png",
        "learning-curves.png",
        "rates.png",
        "costs.png",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    first = {path: path.read_bytes() for path in paths}
    assert first[paths[0]].startswith(b"<!doctype html>")
    write_page(studies.nothing(), tmp_path)
    assert {path: path.read_bytes() for path in paths} == first


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("mine")
    with pytest.raises(NotADirectoryError, match="page is a file, and a page is several: give a folder"):
        write_page(studies.nothing(), tmp_path / "page")
    assert (tmp_path / "page").read_text() == "mine"


def test_the_decision_comes_first_and_the_table_right_below_the_picture(
    browser: Browser, folders: dict[str, Path]
) -> None:
    """Without scrolling, on a desk and on a telephone: what was found, its picture, and the head of the table."""
    for name in ("whole", "thin", "unlearnt"):
        for width, height in ((1280, 900), (390, 844)):
            with opened(browser, folders[name], width, height=height) as page:
                sentence, picture, table = (
                    page.locator(selector).bounding_box()
                    for selector in (".decision", ".overview svg:visible", "#arms")
                )
                assert sentence and picture and table
                assert sentence["y"] < 130 and sentence["y"] + sentence["height"] <= picture["y"] + 1
                assert picture["y"] + picture["height"] <= height
                assert 0 <= table["y"] - (picture["y"] + picture["height"]) < 60 and table["y"] < height - 60
                assert page.locator("thead th[scope=col]:visible").count() <= 6
                assert page.locator("details[open]:not(.item)").count() == 0


@pytest.mark.slow
def test_many_arms_fit_above_the_fold(browser: Browser, tmp_path: Path) -> None:
    write_page(studies.many(), tmp_path)
    for width, height in ((1280, 900), (390, 844)):
        with opened(browser, tmp_path, width, height=height) as page:
            picture = page.locator(".overview svg:visible").bounding_box()
            assert picture and picture["y"] + picture["height"] <= height


def test_a_page_on_which_nothing_was_learnt_says_so_first(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["unlearnt"]) as page:
        assert page.locator("header p").nth(1).inner_text().startswith("Nothing was learnt: no arm answers")
    with opened(browser, folders["nothing"]) as page:
        assert page.locator("header p").nth(1).inner_text() == "Nothing is measured yet."
        assert page.locator(".overview").count() == 0


def test_the_table_has_a_caption_and_a_link_skips_to_it(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"]) as page:
        assert "word sequence reversal" in page.locator("#arms caption").inner_text()
        assert "drop=" not in page.locator("header").inner_text()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the table"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "results"


def test_it_says_what_intervals_cover_and_what_a_tie_may_look_like(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["thin"]) as page:
        said = " ".join((page.locator(".reading").text_content() or "").split())
        assert "for arms with one seed (hra), test items only: another seed may give another number" in said
        assert "only if the interval of the difference leaves out zero" in said
        assert (
            "With one seed, the bars of hra cover test items only."
            in page.locator(".scatter figcaption").first.text_content()
        )


def test_workload_and_caveats_stand_where_they_are_needed(browser: Browser, folders: dict[str, Path]) -> None:
    study = STUDIES["thin"]()
    with opened(browser, folders["thin"]) as page:
        costs = page.locator("section[aria-labelledby=costs]")
        assert "Times and memory: 4 x 64 random tokens, medians of 7 rounds" in costs.locator(".workload").inner_text()
        assert page.locator(".notes li").all_inner_texts() == list(sentences.caveats(study))
    with opened(browser, folders["whole"]) as page:
        assert page.locator(".workload").count() == 0
