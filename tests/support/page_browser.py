"""Pages of made-up studies, opened in headless Chromium: what the tests of the page share."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import page_studies as studies
from lora_lite.lab.report.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FEW = ("lora", "dora", "ia3", "antipasto", "antipasto_asvd", "hra")
STUDIES = {
    "whole": lambda: studies.whole({arm: studies.ARMS[arm] for arm in FEW}),
    "partial": studies.partial,
    "nothing": studies.nothing,
    "nasty": studies.nasty,
    "thin": studies.thin,
    "unlearnt": studies.unlearnt,
    "single": lambda: studies.whole({"lora": studies.ARMS["lora"]}),
}


@pytest.fixture(scope="module", name="browser")
def shared_browser() -> Iterator[Browser]:
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


@pytest.fixture(scope="module", name="folders")
def page_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Study -> the folder of its page, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp(name)
            write_page(STUDIES[name](), self[name])
            return self[name]

    yield Made()


@contextmanager
def opened(
    browser: Browser, folder: Path, width: int = 1280, scheme: str = "light", scripts: bool = True, height: int = 900
) -> Iterator[Page]:
    """The page in a window; leaving it checks that it asked for nothing else and that nothing went wrong."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=scripts, offline=True
    )  # pyright: ignore
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
