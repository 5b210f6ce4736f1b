"""The table of arms: it sorts, filters, and shows by itself what matters, in a wide window and in a narrow one."""

from pathlib import Path

from playwright.sync_api import Browser, Locator, Page

from page_browser import FEW, column, opened, page_folders, shared_browser  # noqa: F401
from page_studies import ARMS


def test_a_click_on_a_header_sorts_by_numbers(browser: Browser, folders: dict[str, Path]) -> None:
    trained = {arm: ARMS[arm][1] for arm in FEW}
    with opened(browser, folders["whole"]) as page:
        header = page.locator("#arms th", has_text="trained parameters")
        header.get_by_role("button").click()
        assert header.get_attribute("aria-sort") == "ascending"
        values = [trained[name] for name in column(page, "arm")]
        assert values == sorted(values) and len(set(values)) > 3
        shown = column(page, "trained parameters")
        assert shown != sorted(shown)  # as text they would be in another order
        header.get_by_role("button").click()
        assert header.get_attribute("aria-sort") == "descending"
        assert [trained[name] for name in column(page, "arm")] == values[::-1]
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
        assert dash.get_attribute("title") == (
            "no accuracy measured yet; still missing: learning rates 0.0002, 0.0004 not tried yet; "
            "seeds 1, 2, 3 not measured yet"
        )
        assert "not measured yet" in (page.locator("td.none").last.get_attribute("title") or "")


def test_rows_are_filtered_by_words_and_by_verdict(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"]) as page:
        page.locator("#choices summary").click()
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


def test_the_first_column_stays_while_the_table_scrolls(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"], 390) as page:
        everything(page)
        name = page.locator("#arm-rows th").first
        before = name.bounding_box()
        page.locator(".scroll").evaluate("box => { box.scrollLeft = 700; }")
        assert page.locator(".scroll").evaluate("box => box.scrollLeft") == 700
        assert name.bounding_box() == before
        wide = page.locator(".scroll").evaluate("box => box.scrollWidth - box.clientWidth")
        assert wide > 700  # it scrolls inside its own box


def overflow(page: Page) -> int:
    """How many pixels of the table are out of sight."""
    return page.locator(".scroll").evaluate("box => box.scrollWidth - box.clientWidth")


def shown_groups(page: Page) -> list[str]:
    return page.locator("#arms th[scope=colgroup]:visible").all_inner_texts()


def everything(page: Page) -> None:
    """Switch every group of columns on."""
    page.evaluate("document.getElementById('choices').open = true")
    for choice in page.locator("#group-controls input").all():
        choice.check()


def in_rows(page: Page, selector: str) -> dict[str | None, Locator]:
    """Arm -> what fits the selector in its row."""
    rows = page.locator("#arm-rows tr").all()
    return {row.locator("th").get_attribute("data-sort"): row.locator(selector) for row in rows}


GROUPS = ["Result", "Places and seeds", "Training", "Replies", "Time and memory", "Forgetting"]


def test_what_is_shown_at_first_fits_a_desk(browser: Browser, folders: dict[str, Path]) -> None:
    for name in ("whole", "thin"):
        with opened(browser, folders[name]) as page:
            assert shown_groups(page) == ["Result"]
            assert overflow(page) == 0
            assert page.locator("#scroll-hint").is_hidden()
            for label in ("accuracy", "verdict", "trained parameters", "file"):
                box = page.locator("#arms th[scope=col]", has_text=label).first.bounding_box()
                assert box and box["x"] + box["width"] <= 1280


def test_groups_of_columns_are_switched_on_and_off(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"]) as page:
        everything(page)
        assert [text.strip() for text in page.locator("#group-controls label").all_inner_texts()] == GROUPS
        assert shown_groups(page) == GROUPS
        assert overflow(page) > 0 and page.locator("#scroll-hint").is_visible()
        page.get_by_role("checkbox", name="Result").uncheck()
        assert shown_groups(page) == GROUPS[1:]
        assert page.locator("#arms .g0:visible").count() == 0 < page.locator("#arms .g1:visible").count()
        page.get_by_role("checkbox", name="Forgetting").focus()
        page.keyboard.press("Space")
        assert shown_groups(page) == GROUPS[1:-1]


def test_no_order_is_left_by_a_column_out_of_sight(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"]) as page:
        before = column(page, "arm")
        page.locator("#arms th", has_text="trained parameters").get_by_role("button").click()
        assert column(page, "arm") != before
        page.locator("#choices summary").click()
        page.get_by_role("checkbox", name="Result").uncheck()
        assert column(page, "arm") == before and page.locator("[aria-sort]").count() == 0


def test_without_scripts_everything_shows(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["whole"], scripts=False) as page:
        assert shown_groups(page) == GROUPS
        assert page.locator("form:visible").count() == 0
        assert page.locator("#scroll-hint").is_visible()


def test_a_telephone_shows_the_outcome_without_scrolling(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["thin"], 390) as page:
        gists = {
            row.locator("th").get_attribute("data-sort"): row.locator(".gist")
            for row in page.locator("#arm-rows tr").all()
        }
        said = {name: " ".join(gist.inner_text().split()) for name, gist in gists.items()}
        assert said == {
            "lora": "◆ baseline, place 1–4, highest rate tried",
            "dora": "● tie, place 1–4, lowest rate tried",
            "hra": "needs two seeds, place 1–4, 1 of 3 seeds",
            "road": "▼ worse, place 1–4",
        }
        for gist in gists.values():
            box = gist.bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 390
        for label in ("accuracy", "difference to lora"):
            box = page.locator("#arms th[scope=col]", has_text=label).bounding_box()
            assert box and box["x"] + box["width"] <= 391
        assert page.locator("#scroll-hint").is_visible()
        page.locator(".scroll").evaluate("box => { box.scrollLeft = 10000; }")
        page.wait_for_function("!document.getElementById('frame').classList.contains('more')")
    with opened(browser, folders["thin"]) as page:
        assert page.locator(".gist:visible").count() == 0


def test_verdicts_say_where_the_rate_is_at_the_edge(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["thin"]) as page:
        cells = {
            row.locator("th").get_attribute("data-sort"): row.locator("td.verdict")
            for row in page.locator("#arm-rows tr").all()
        }
        said = {name: cell.inner_text().split("\n") for name, cell in cells.items()}
        assert said == {
            "lora": ["◆ baseline", "highest rate tried"],
            "dora": ["● tie", "sees 50.0", "lowest rate tried"],
            "hra": ["needs two seeds"],
            "road": ["▼ worse"],
        }
        assert "fewer than two seeds" in (cells["hra"].get_attribute("title") or "")
        assert "the lowest learning rate tried was the best" in (cells["dora"].get_attribute("title") or "")
        page.locator("#choices summary").click()
        page.select_option("#verdict", "")
        assert column(page, "arm") == ["hra"]


def test_differences_carry_p_and_one_seed_says_what_it_covers(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["thin"]) as page:
        row = page.locator("#arm-rows tr", has=page.locator("th[data-sort=dora]"))
        assert " ".join(row.locator("td").nth(1).inner_text().split()) == "−42.7 −88.8 to +6.7 p = 0.23"
        assert "p < 0.001" in page.locator("#arm-rows tr", has_text="road").inner_text()
        one = page.locator("#arm-rows tr", has=page.locator("th[data-sort=hra]"))
        assert [one.locator("td").nth(at).inner_text().split("\n")[-1] for at in (0, 1)] == ["items only"] * 2
        assert "p =" not in one.inner_text()
        assert page.locator("#arms").inner_text().count("items only") == 2


def test_no_number_has_a_hyphen_for_a_minus(browser: Browser, folders: dict[str, Path]) -> None:
    with opened(browser, folders["thin"]) as page:
        everything(page)
        assert "−4.862 to 10.184" in page.locator("#arms").inner_text()
        hyphens = """() => [...document.querySelectorAll('#arms td, svg text, .score, header p, .reading p, .notes li')]
            .map(each => each.textContent).filter(text => /(^|[^\\w])-\\.?\\d|\\de-\\d/.test(text))"""
        assert page.evaluate(hyphens) == []
