"""The page of a study, opened in headless Chromium: no request, no error, and what can be clicked works."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import page_studies as studies
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lora_lite.lab.findings import Findings
from lora_lite.lab.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FEW = ("lora", "dora", "ia3", "antipasto", "antipasto_asvd", "hra")
STUDIES = {
    "whole": lambda: studies.whole({arm: studies.ARMS[arm] for arm in FEW}),
    "partial": studies.partial,
    "nothing": studies.nothing,
    "nasty": studies.nasty,
    "single": lambda: studies.whole({"lora": studies.ARMS["lora"]}),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    where = next(filter(None, map(shutil.which, BROWSERS)), None)
    if where is None:
        hint = "no chromium on PATH: `make browser` as root, or `apt-get install chromium`, lets this test run"
        if os.environ.get("CI") == "true" and shutil.which("apt-get"):
            pytest.fail(hint)
        pytest.skip(hint)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=where, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Study -> the folder of its page, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp(name)
            write_page(STUDIES[name](), self[name])
            return self[name]

    yield Made()


@contextmanager
def opened(browser: Browser, folder: Path, width: int = 1280, scheme: str = "light") -> Iterator[Page]:
    """The page in a window; leaving it checks that it asked for nothing else and that nothing went wrong."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)  # pyright: ignore
    page = context.new_page()
    page.set_default_timeout(10_000)
    wrong: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folder / "index.html").as_uri())
    yield page
    context.close()
    assert wrong == []
    assert [url for url in requests if not url.startswith("data:,")] == [(folder / "index.html").as_uri()]


def column(page: Page, label: str) -> list[str]:
    """The first line of a column's cells, from the top, of the rows that are shown."""
    script = """label => {
        const headers = [...document.querySelectorAll('#arms th[scope=col]')];
        const at = headers.findIndex(header => header.innerText.trim() === label);
        return [...document.querySelectorAll('#arm-rows tr')].filter(row => !row.hidden)
            .map(row => row.cells[at].innerText.trim().split('\\n')[0]);
    }"""
    return page.evaluate(script, label)


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


def test_a_click_on_a_header_sorts_by_numbers(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"]) as page:
        header = page.locator("#arms th", has_text="trained parameters")
        header.get_by_role("button").click()
        assert header.get_attribute("aria-sort") == "ascending"
        values = [int(text.replace(",", "")) for text in column(page, "trained parameters")]
        assert values == sorted(values) and len(set(values)) > 3
        assert values != sorted(values, key=str)  # as text they would be in another order
        header.get_by_role("button").click()
        assert header.get_attribute("aria-sort") == "descending"
        assert [int(text.replace(",", "")) for text in column(page, "trained parameters")] == values[::-1]
        page.locator("#arms th", has_text="difference to lora").get_by_role("button").click()  # best first
        differences = [float(text.replace("−", "-")) for text in column(page, "difference to lora")]
        assert differences == sorted(differences, reverse=True) and sum(value < 0 for value in differences) > 2
        page.locator("#arms th", has_text="accuracy").get_by_role("button").click()
        accuracies = [float(text.rstrip("%")) for text in column(page, "accuracy")]
        assert accuracies == sorted(accuracies, reverse=True)
        assert page.locator("[aria-sort]").count() == 1


def test_the_keyboard_sorts_too_and_names_are_text(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"]) as page:
        page.locator("#arms th", has_text="arm").first.get_by_role("button").focus()
        page.keyboard.press("Enter")
        names = page.locator("#arm-rows th").evaluate_all("cells => cells.map(cell => cell.dataset.sort)")
        assert names == sorted(FEW)
        page.keyboard.press("Space")
        names = page.locator("#arm-rows th").evaluate_all("cells => cells.map(cell => cell.dataset.sort)")
        assert names == sorted(FEW, reverse=True)


def test_missing_values_come_last_either_way_and_say_why(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["partial"]) as page:
        button = page.locator("#arms th", has_text="accuracy").get_by_role("button")
        for _ in range(2):
            button.click()
            assert column(page, "accuracy") == ["65.5%", "—", "—"]
        dash = page.locator("#arm-rows tr", has_text="dora").locator("td").first
        assert dash.get_attribute("title") == "no accuracy measured yet; still missing: 2 of 3 rates, 3 seeds"
        assert "not measured yet" in (page.locator("td.none").last.get_attribute("title") or "")


def test_rows_are_filtered_by_words_and_by_verdict(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"]) as page:
        page.fill("#find", "ANTI asvd")
        assert column(page, "arm") == ["antipasto_asvd"]
        assert page.locator("#arm-count").inner_text() == "1 of 6 arms"
        page.fill("#find", "")
        page.select_option("#verdict", "baseline")
        assert column(page, "arm") == ["lora"]
        page.select_option("#verdict", "better")
        assert column(page, "arm") == []
        page.select_option("#verdict", "*")
        assert len(column(page, "arm")) == len(FEW)
        assert page.locator("tbody.base tr").is_visible()


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


def test_the_first_column_stays_while_the_table_scrolls(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"], 390) as page:
        name = page.locator("#arm-rows th").first
        before = name.bounding_box()
        page.locator(".scroll").evaluate("box => { box.scrollLeft = 700; }")
        assert page.locator(".scroll").evaluate("box => box.scrollLeft") == 700
        assert name.bounding_box() == before
        wide = page.locator(".scroll").evaluate("box => box.scrollWidth - box.clientWidth")
        assert wide > 700  # it scrolls inside its own box


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
        assert page.locator(".missing li").all_inner_texts() == list(studies.partial().missing)
        assert "1 of 3 arms measured, 3 of 9 seeds" in page.locator("header").inner_text()
        assert "No cost is measured yet." in page.locator("main").inner_text()
    with opened(browser, folders["whole"]) as page:
        assert page.locator(".missing").count() == 0
        assert "Against lora, of 5 other arms:" in page.locator("header").inner_text()


def test_files_are_replaced_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("old")
    paths = write_page(studies.nothing(), tmp_path)
    assert [path.name for path in paths] == [
        "index.html",
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
