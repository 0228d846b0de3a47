"""The report in a real browser, from disk: nothing is fetched, nothing fails, and it fits a desk and a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qlora_train.artifacts.layout import RunDir
from qlora_train.report.run import write_report
from tests.runfolders import RECIPE, write_history, write_run

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
WIDTHS = {"desk": 1280, "phone": 390}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, one that was stopped, resumed and forked, and three side by side."""
    folder = tmp_path_factory.mktemp("browser")
    one = write_run(folder / "a-run-with-a-name-that-is-rather-long-for-a-phone")
    interrupted = RunDir(write_run(folder / "interrupted"))
    write_history(interrupted)
    others = [write_run(folder / name, seed=7, recipe=RECIPE.replace("0.01", "0.02")) for name in ("second", "third")]
    return {
        "one run": write_report([one], folder / "one.html").page,
        "interrupted run": write_report([interrupted.root], folder / "interrupted.html").page,
        "three runs": write_report([one, *others], folder / "three.html").page,
    }


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page in a window, and what went wrong or was asked of the network."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url))
    page.goto(path.as_uri())
    assert troubles == [path.as_uri()], "the page itself is the only request, and the console stays silent"
    return page, troubles


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("which", ["one run", "interrupted run", "three runs"])
def test_it_fits_and_its_figures_show(browser: Any, pages: dict[str, Path], which: str, width: int) -> None:
    page, _ = opened(browser, pages[which], width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off to the right"
    boxes = [figure.bounding_box() for figure in page.locator("svg").all()]
    assert len(boxes) == {"one run": 8, "interrupted run": 8, "three runs": 16}[which]
    assert all(box and box["width"] > 250 and box["height"] > 60 for box in boxes)
    # A text of 12 units in a box of 400 stays legible.
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 8
    page.close()


def test_a_dark_page_is_dark_and_its_curves_are_not(browser: Any, pages: dict[str, Path]) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        page, _ = opened(browser, pages["one run"], WIDTHS["desk"], scheme)
        colours = page.evaluate(
            """() => [getComputedStyle(document.body).backgroundColor,
                      getComputedStyle(document.body).color,
                      getComputedStyle(document.querySelector('svg text')).fill,
                      getComputedStyle(document.querySelector('#course svg [style*="--c0"]')).stroke]"""
        )
        brightness[scheme] = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in colours]
        page.close()
    page_light, *ink_light = brightness["light"]
    page_dark, *ink_dark = brightness["dark"]
    assert page_light > 240 and page_dark < 40
    assert all(page_light - ink > 60 for ink in ink_light), "dark on light"
    assert all(ink - page_dark > 25 for ink in ink_dark), "light on dark"
    assert ink_light != ink_dark


def test_all_modules_open_without_a_script_and_print(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["one run"], WIDTHS["phone"])
    module = page.get_by_text("layers.1.q_proj", exact=True)
    assert not module.is_visible()
    page.get_by_text("All 5 modules").click()
    assert module.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS["phone"]
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    page.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_numbers_of_marks_do_not_run_into_each_other(browser: Any, pages: dict[str, Path], width: int) -> None:
    page, _ = opened(browser, pages["interrupted run"], width)
    for figure in page.locator("#course svg").all():
        boxes = [found for text in ("1", "2, 4", "5, 6", "7") if (found := figure.get_by_text(text, exact=True).last)]
        edges = [box for found in boxes if (box := found.bounding_box())]
        assert len(edges) == 4
        assert all(left["x"] + left["width"] < right["x"] for left, right in pairwise(edges))
    page.get_by_text("Step 21 came to no finite number").click()
    assert page.get_by_text("row 3").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_the_watch_sees_what_a_page_fetches(browser: Any, tmp_path: Path) -> None:
    """Negative control."""
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'>")
    with pytest.raises(AssertionError, match="the only request"):
        opened(browser, path, 390)
