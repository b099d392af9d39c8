"""The report in the folder of a model."""

import pytest

from optimum_sparse import SparsePruner
from optimum_sparse.report import PAGE_FILE, REPORT_FILE, read_report, write_report

from ..helpers import tiny_model
from .reports import full_report


def test_page_is_kept_up_to_date_and_not_added(tmp_path):
    report = full_report()
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report and not (tmp_path / PAGE_FILE).exists()
    write_report(report, tmp_path, page=True)
    report.evaluations = []
    write_report(report, tmp_path)
    assert (tmp_path / PAGE_FILE).read_text() == report.to_html()
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGE_FILE, REPORT_FILE]


def test_saving_again_renews_the_page_that_is_there(tmp_path):
    model = tiny_model()
    pruner = SparsePruner(method="magnitude", progress=False)
    pruner.prune(model)
    pruner.save(model, tmp_path)
    assert not (tmp_path / PAGE_FILE).exists()
    write_report(full_report(), tmp_path, page=True)
    pruner.save(model, tmp_path)
    assert (tmp_path / PAGE_FILE).read_text() == pruner.report.to_html()


def test_no_report(tmp_path):
    assert read_report(tmp_path) is None and read_report(tmp_path / "nowhere") is None


def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch):
    write_report(full_report(), tmp_path)
    before = (tmp_path / REPORT_FILE).read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        write_report(full_report(blocks=9), tmp_path)
    assert (tmp_path / REPORT_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [REPORT_FILE]
