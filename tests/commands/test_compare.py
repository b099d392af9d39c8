"""`optimum-cli sparse compare` on folders with reports."""

from functools import partial
from pathlib import Path

import pytest

from optimum_sparse.report import REPORT_FILE, compare_reports, read_report, write_report
from tests.commands.cli import sparse
from tests.report.reports import full_report

run = partial(sparse, "compare")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    found = [tmp_path / name for name in ("one/a", "one/b", "two/a")]
    for blocks, folder in enumerate(found, start=1):
        folder.mkdir(parents=True)
        write_report(full_report(blocks), folder)
    return found


def test_table_and_page(folders: list[Path], capsys: pytest.CaptureFixture):
    assert run(*folders) == 0
    names = [str(folders[0]), "b", str(folders[2])]  # those of one name are told by their folders
    expected = compare_reports({name: read_report(f) for name, f in zip(names, folders, strict=True)})
    printed = capsys.readouterr().out
    assert expected.table() in printed and "To look at: compare.html" in printed
    assert Path("compare.html").read_text() == expected.page()
    assert run(*folders[:2], folders[0], "--html", "new/other.html") == 0  # the same folder twice is one model
    assert "2 pruned models" in Path("new/other.html").read_text()


def test_a_name_and_the_same_in_another_folder(folders: list[Path], capsys: pytest.CaptureFixture):
    folders[2].rename("a")
    for order in (["one/a", "a"], ["a", "one/a"]):
        assert run(*order) == 0
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= set(order)


def test_folders_without_a_report(folders: list[Path], capsys: pytest.CaptureFixture):
    (folders[1] / REPORT_FILE).write_text('{"schema": 99}')
    assert run(*folders) == 2
    assert "of version 99" in capsys.readouterr().err
    (folders[1] / REPORT_FILE).unlink()
    assert run(*folders) == 2
    assert f"{folders[1]} has no {REPORT_FILE}" in capsys.readouterr().err
    assert not Path("compare.html").exists()
