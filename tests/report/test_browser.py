"""The pages in a real browser: nothing goes wrong, everything is drawn, nothing is fetched, a keyboard is enough."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from optimum_sparse.report import compare_reports
from tests.browser import chromium, needs_chromium

from .reports import full_report
from .test_comparison import report as short_report

pytestmark = needs_chromium

SCREENS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    full_report(blocks=40).to_html(folder / "report.html")
    reports = {"a": short_report(12.5, 140_000_000, 31.0), "b": short_report(20.0, 90_000_000, 40.0)}
    (folder / "compare.html").write_text(compare_reports(reports).page(), encoding="utf-8")
    return {file.stem: file for file in folder.iterdir()}


class Opened:
    """A page that is open, and what went wrong since."""

    def __init__(self, browser: Any, file: Path, screen: str = "desktop", scheme: str = "light") -> None:
        self.context = browser.new_context(viewport=SCREENS[screen], color_scheme=scheme, offline=True)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.fetched: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *exception: object) -> None:
        self.context.close()
        if exception[0] is None:
            assert self.wrong == [] and len(self.fetched) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_everything_is_drawn(browser, pages, name: str, screen: str, scheme: str):
    with Opened(browser, pages[name], screen, scheme) as page:
        plots = page.locator("svg")
        assert plots.count() == {"report": 8, "compare": 2}[name]
        for plot in plots.all():
            box = plot.bounding_box()
            assert box["width"] > 200 and box["height"] > 60
            assert plot.get_attribute("aria-label")
            # Marks of the plot, not only its axes: something is filled or drawn in a colour of the page.
            assert plot.locator("path, use").count() > 3
        ground, ink = (
            page.evaluate(f"getComputedStyle(document.body).{what}") for what in ("backgroundColor", "color")
        )
        assert (luminance(ground) > luminance(ink)) == (scheme == "light")
        assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen]["width"]


def luminance(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])


def drawn(page: Any) -> tuple[int, str]:
    """How many colours the picture of the mask has, and what it is."""
    return tuple(
        page.evaluate(
            """() => {
                const canvas = document.querySelector("canvas");
                const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                const colours = new Set();
                for (let i = 0; i < data.length; i += 4) colours.add(data.slice(i, i + 4).join());
                return [colours.size, canvas.toDataURL()];
            }"""
        )
    )


def test_the_picture_can_be_explored(browser, pages):
    with Opened(browser, pages["report"]) as page:
        colours, mask = drawn(page)
        assert colours > 1
        page.select_option("#what", "weights")
        colours, weights = drawn(page)
        assert colours > 10 and weights != mask
        page.click("#closer")
        assert drawn(page)[1] != weights
        page.click("#whole")
        assert drawn(page)[1] == weights
        page.select_option("#which", "1")
        assert drawn(page)[1] != weights
        page.hover("canvas")
        assert page.text_content("#cell").strip()


def test_a_keyboard_is_enough(browser, pages):
    with Opened(browser, pages["report"]) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert {"which", "what", "closer", "farther", "whole", "canvas", "SUMMARY", "A"} <= reached
        page.select_option("#what", "weights")  # of which no two pieces are the same
        page.focus("canvas")
        before = drawn(page)[1]
        page.keyboard.press("+")
        closer = drawn(page)[1]
        page.keyboard.press("ArrowRight")
        assert len({before, closer, drawn(page)[1]}) == 3
        outline = page.evaluate("getComputedStyle(document.querySelector('canvas')).outlineStyle")
        assert outline != "none"  # one sees where one is


def test_what_a_screen_reader_needs(browser, pages):
    for name in pages:
        with Opened(browser, pages[name]) as page:
            levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
            assert levels[0] == 1 and levels.count(1) == 1
            assert all(after <= before + 1 for before, after in pairwise(levels))
            unnamed = page.evaluate(
                """() => [...document.querySelectorAll("button, select, canvas, section, svg, table, [tabindex]")]
                    .filter(e => !["aria-label", "aria-labelledby", "aria-describedby"].some(a => e.getAttribute(a)))
                    .filter(e => !(e.labels?.length || e.caption || e.textContent.trim()))
                    .map(e => e.outerHTML.slice(0, 80))"""
            )
            assert unnamed == []
            ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
            assert len(ids) == len(set(ids))
            assert page.evaluate("document.documentElement.lang") == "en"


def test_prints_without_what_is_only_for_screens(browser, pages):
    with Opened(browser, pages["report"]) as page:
        page.emulate_media(media="print")
        assert not page.is_visible("nav") and not page.is_visible(".controls >> nth=0")
        assert page.is_visible("svg >> nth=0") and page.is_visible("#facts table")
        assert len(page.pdf()) > 20_000
