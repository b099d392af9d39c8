"""Several reports side by side, against figures worked out by hand."""

import copy
import re

import pytest

from optimum_sparse.report import SparsityReport, compare_reports
from optimum_sparse.report.comparison import pareto

from .reports import BENCH, EVALUATION, HOSTILE, full_report


def report(perplexity: float, size: int, speed: float | None = None, **options) -> SparsityReport:
    result = full_report()
    text = {**EVALUATION["texts"][0], "perplexity": perplexity, "ratio": perplexity / 10, **options}
    result.evaluations = [{**EVALUATION, "texts": [text]}]
    result.sizes["saved"] = size
    result.recovery = None
    result.bench = copy.deepcopy(BENCH) if speed else None
    if speed:
        result.bench["batches"][0]["sparse"]["decode"] = speed
    return result


def test_figures():
    found = compare_reports({"a": report(12.5, 140_000_000, 31.0), "b": report(20.0, 90_000_000)})
    a, b = found.candidates
    assert (a.name, a.how, a.zeros, a.size) == ("a", "sparsegpt 2:4", 0.5, 140_000_000)
    assert (a.perplexity, a.ratio, a.kl, a.decode) == (12.5, 1.25, 0.125, 31.0)
    assert (b.perplexity, b.decode) == (20.0, None)
    assert found.text == "wikitext2, 20 windows of 2048 tokens"
    assert found.notes == ["Speed not measured: b; `optimum-cli sparse bench`."]
    lines = found.table().splitlines()
    assert lines[0].split() == ["model", "how", "zeros", "files", "perplexity", "×", "dense", "KL", "decode"]
    assert lines[2].split() == [
        "a",
        "sparsegpt",
        "2:4",
        "50.00%",
        "140.0",
        "MB",
        "12.5",
        "1.250",
        "0.1250",
        "31.0",
        "tokens/s",
    ]


def test_only_like_is_compared_with_like():
    reports = {
        "a": report(12.5, 10),
        "b": report(11.0, 10, num_windows=4),
        "c": report(14.0, 10),
        "d": SparsityReport(config={"method": "wanda", "sparsity": 0.6}, model="other"),
    }
    reports["c"].evaluations.insert(0, {"texts": [{**EVALUATION["texts"][0], "perplexity": 99.0}], "tasks": []})
    found = compare_reports(reports)
    assert [candidate.perplexity for candidate in found.candidates] == [12.5, None, 14.0, None]  # the latest counts
    assert found.candidates[3].how == "wanda 60%"
    assert "No perplexity like that of the others: b, d" in found.notes[0]
    assert found.notes[-1] == "They were made from different models: other, some/base."


def test_other_machines_are_named():
    reports = {"a": report(12.5, 10, 31.0), "b": report(12.5, 10, 20.0)}
    assert compare_reports(reports).notes == []
    reports["b"].bench["machine"]["threads"] = 4
    assert "different machines" in compare_reports(reports).notes[0]


def test_other_settings_are_named():
    reports = {"a": report(12.5, 10, 31.0), "b": report(12.5, 10, 20.0)}
    reports["b"].bench.update(dtype="float32", prefer="speed")
    assert compare_reports(reports).notes == []  # of an older report it is not known
    reports["a"].bench.update(dtype="bfloat16", prompt_tokens=1, prefer="speed")
    (note,) = compare_reports(reports).notes
    assert note == "Speeds were measured with different dtype, prompt_tokens, and cannot be compared."


@pytest.mark.parametrize(
    ("smaller", "best"), [(True, ["tiny", "small", "good"]), (False, ["good", "large"])], ids=["size", "speed"]
)
def test_what_no_other_beats(smaller: bool, best: list[str]):
    points = {
        "good": (5.0, 1.0),
        "tiny": (1.0, 9.0),
        "small": (2.0, 4.0),
        "bad": (4.0, 6.0),
        "large": (7.0, 4.0),
        "as good": (3.0, 4.0),
    }
    for name, (x, y) in points.items():  # the definition
        beaten = any((a <= x if smaller else a >= x) and b <= y and (a, b) != (x, y) for a, b in points.values())
        assert (name in best) != beaten
    assert pareto(points, smaller) == best


def test_page():
    found = compare_reports({"a": report(12.5, 140_000_000, 31.0), "b": report(20.0, 90_000_000, 40.0)})
    page = found.page()
    assert page.count("<svg") == 2 and "2 pruned models compared" in page
    assert "No other model here beats these in both: b, a." in page  # from small to large
    assert not re.search(r"(src|href)=\"(?!#)", page) and len(page) < 200_000
    assert "<svg" not in compare_reports({"a": report(12.5, 1)}).page()


def test_names_are_text():
    reports = {HOSTILE: report(12.5, 140_000_000, 31.0, dataset=HOSTILE), "b": report(20.0, 90_000_000, 40.0)}
    page = compare_reports(reports).page()
    assert "<script>document" not in page and "<img" not in page
