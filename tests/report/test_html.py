"""The page: complete, in one file, small, and safe whatever the report says. How it looks, a browser test sees."""

import base64
import hashlib
import itertools
import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest

from optimum_sparse.report import SparsityReport

from .reports import HOSTILE, entry, full_report, hostile_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What a page holds: tags with their attributes, the texts by tag, and whether all that is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(full_report().to_html())


def test_everything_is_on_it(page: Page):
    assert page.text("h2") == [
        "Summary",
        "Layers: depth × matrix",
        "Error over depth",
        "Masks and weights",
        "Time and memory",
        "Samples",
        "Recovery",
        "What stayed dense, and notes",
        "How to reproduce",
    ]
    assert page.text("h1") == page.text("title")[:1] == ["some/base, pruned"]
    cells = page.text("td")
    for fact in ("12.5 [12, 13]", "× 1.250 [1.200, 1.300]", "0.6100 ± 0.0200", "-0.0700 [-0.1100, -0.0300]"):
        assert fact in cells  # quality
    for fact in ("250.0 MB", "140.0 MB", "× 0.56", "300.0 MB", "180.0 MB", "31.0 tokens/s", "× 1.55"):
        assert fact in cells  # size and speed
    for fact in ("5.0 s", "2.0 s", "1.00 GB", "2,048 of 2,048"):
        assert fact in cells  # cost and pictures
    everything = " ".join(text for _, text in page.texts)
    for fact in ("optimum-cli sparse prune some/base OUT --pattern 2:4", "routes tokens", "h.*.gate (2)", " a city."):
        assert fact in everything


def test_plots_have_a_mark_for_each_figure(page: Page):
    titles = page.text("title")[1:]
    # two heatmaps, hidden states, reconstruction and correction before and after, mean and worst
    assert len(titles) == 2 * 3 * 4 + 3 + 3 * 2 * 3
    assert "h.2, mlp.down: 6.00%" in titles and "h.1: hidden states 2 %" in titles
    assert len(page.all("svg")) == 2 + 4 + 2


def test_plots_over_the_blocks_have_their_figures_in_tables(page: Page):
    cells = "|".join(text for tag, text in page.texts if tag in ("th", "td"))
    for rows in (
        "block|hidden states|h.0|1.000%|h.1|2.000%|h.2|3.000%",
        "block|before|after|h.0|4.000%|3.000%|h.1|",
        "block|before|after|correction|h.0|5.000%|4.000%|0.5|h.1|",
        "block|mean|worst matrix|h.0|2.500%|4.000%|h.1|3.500%|5.000%|",
    ):
        assert rows in cells


def test_it_can_be_used_without_seeing_or_pointing(page: Page):
    assert page.all("html") == [{"lang": "en"}]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    scrolling = [attributes for attributes in page.all("div") if "tabindex" in attributes]
    assert scrolling and all(attributes["role"] == "group" and attributes["aria-label"] for attributes in scrolling)
    assert all(attributes.get("aria-labelledby") for attributes in page.all("section"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
    links = [attributes["href"] for attributes in page.all("a")]
    assert all(link.removeprefix("#") in ids for link in links)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("table")) >= len(page.all("svg")) - 1  # one has the figures of both heatmaps


def test_nothing_is_loaded_from_elsewhere(page: Page):
    assert {tag for tag, attributes in page.tags if "src" in attributes} == set()
    assert page.all("link") == []
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = [text for tag, text in page.texts if tag == "script" and "use strict" in text]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(r"url\((?!#)|@import", full_report().to_html())


def test_nothing_that_a_report_says_becomes_part_of_the_page():
    text = hostile_report().to_html()
    page = Page(text)
    assert len(page.all("script")) == 2  # the data and ours
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text("h1") == [f"{HOSTILE}, pruned"]
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def test_an_empty_report_has_a_page():
    page = Page(SparsityReport(config={}).to_html())
    assert page.text("h2") == ["Summary", "What stayed dense, and notes", "How to reproduce"]
    assert any("sparse evaluate" in text for text in page.text("p"))


def test_the_largest_models_stay_under_three_megabytes(tmp_path):
    """128 blocks of 16 kinds of matrices, one of them 128 experts each with a note of its own kind."""
    report = full_report()
    report.matrices = [
        entry(f"model.layers.{block}.some.longer.name_{kind}_proj{part}", f"model.layers.{block}", notes=("odd",))
        for block in range(128)
        for kind in range(16)
        for part in ([f".{expert}" for expert in range(128)] if kind == 15 else [""])
    ]
    report.depth_error = {f"model.layers.{block}": 0.1 for block in range(128)}
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    assert len(text.encode()) < 3e6
    assert text.count(": odd") == 1  # not a note for each matrix


def test_the_same_report_gives_the_same_page():
    assert full_report().to_html() == full_report().to_html()
