"""The report's JSON, its schema and its table."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from optimum_sparse.report import SparsityReport
from optimum_sparse.report.record import SCHEMA

from .reports import entry, full_report, hostile_report

ROOT = Path(__file__).parents[2]


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
    assert SparsityReport.from_json(tmp_path / "report.json") == report()


@pytest.mark.parametrize("make", [full_report, hostile_report, lambda: SparsityReport(config={})])
def test_what_is_read_is_what_was_written(make):
    assert SparsityReport.from_dict(json.loads(make().to_json())) == make()


def test_every_field_is_tested():
    empty = SparsityReport(config={})
    assert all(getattr(full_report(), f.name) != getattr(empty, f.name) for f in dataclasses.fields(empty))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": SCHEMA + 1},
            rf"report.json: .* of version {SCHEMA + 1}, .* reads up to {SCHEMA}: upgrade",
        ),
        ({"schema": None}, 'has no number "schema"'),
        ({"colour": "blue"}, "damaged, or was written by something else: .*'colour'"),
        ({"seconds": [1]}, r"damaged, .*: seconds is \[1\]"),
        ({"matrices": [{}]}, "damaged"),
        ({"matrices": [{**full_report().to_dict()["matrices"][0], "zeros": "many"}]}, "zeros is 'many'"),
        ({"pictures": [3]}, "damaged"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, change, message):
    (tmp_path / "report.json").write_text(json.dumps({**full_report().to_dict(), **change}))
    with pytest.raises(ValueError, match=message):
        SparsityReport.from_json(tmp_path / "report.json")


@pytest.mark.parametrize("text", ["[]", "3", "{}", "no JSON"])
def test_files_that_are_something_else(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "report.json"))):
        SparsityReport.from_json(tmp_path / "report.json")


def test_schema_is_up_to_date():
    """The golden file: a change of it is a change of what others read."""
    script = ROOT / "docs" / "scripts" / "report_schema.py"
    spec = importlib.util.spec_from_file_location("report_schema", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.render(), "run: python docs/scripts/report_schema.py"


def test_reports_follow_the_schema():
    """Names and types as the schema has them, read by a reader that is not ours."""
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    content = full_report().to_dict()
    assert sorted(content) == sorted(schema["properties"]) == schema["required"]
    assert content.pop("schema") == schema["properties"]["schema"]["const"]
    for name in ("matrices", "pictures"):
        kind = schema["$defs"][schema["properties"][name]["items"]["$ref"].rpartition("/")[2]]
        assert all(set(one) == set(kind["properties"]) for one in content[name])
    del content["sparsity"]
    reader = TypeAdapter(SparsityReport)
    assert reader.validate_python(content) == full_report()
    with pytest.raises(ValidationError):
        reader.validate_python({**content, "seconds": {"total": "long"}})


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
