"""The report's JSON and table."""

import json

from optimum_sparse.report import MatrixReport, SparsityReport


def entry(name, block, zeros, error, **options):
    return MatrixReport(
        name=name,
        block=block,
        shape=(4, 8),
        pattern="2:4",
        zeros=zeros,
        numel=32,
        error=error,
        num_tokens=10,
        layer_share=0.0,
        damping=None,
        residual=None,
        seconds=1.5,
        **options,
    )


def report():
    return SparsityReport(
        config={"method": "wanda"},
        matrices=[
            entry("h.0.fc", "h.0", 16, 0.01),
            entry("h.0.proj", "h.0", 16, 0.03, notes=("something odd",)),
            entry("h.1.fc", "h.1", 8, None),
        ],
        skipped={"lm_head": "matches ignore", **{f"x.{n}": "did not run" for n in range(5)}},
        seconds={"forward": 3.25, "total": 5.0},
        peak_memory=3 * 2**30,
        notes=["one for all"],
    )


def test_json_round_trip(tmp_path):
    text = report().to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    content = json.loads(text)
    assert content == report().to_dict()
    assert content["matrices"][1]["notes"] == ["something odd"]
    assert content["sparsity"] == 40 / 96


def test_table_has_a_line_per_block_and_what_was_odd():
    lines = report().table().splitlines()
    cells = [line.split() for line in lines]
    assert cells[2] == ["h.0", "2", "50.00", "%", "2.00", "%", "3.00", "%", "3.0"]
    assert cells[3] == ["h.1", "1", "25.00", "%", "1.5"]
    assert cells[5] == ["total", "3", "41.67", "%", "2.00", "%", "3.00", "%", "4.5"]
    assert "time: forward 3.2 s, total 5.0 s" in lines
    assert "peak memory: 3.00 GiB" in lines
    assert "left dense: lm_head (matches ignore)" in lines
    assert "left dense: x.0, x.1, x.2 and 2 more (did not run)" in lines
    assert lines[-2:] == ["note: one for all", "note: h.0.proj: something odd"]


def test_an_empty_report_has_a_table():
    assert "total" in SparsityReport(config={}).table()
