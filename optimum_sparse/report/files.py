"""The report in the folder of a model, to which is added what is found out later."""

from __future__ import annotations

from pathlib import Path

from ..saving import replace_file
from .record import SparsityReport

# What it is called beside a model, as JSON and as a page.
REPORT_FILE, PAGE_FILE = "sparsity_report.json", "sparsity_report.html"


def read_report(folder: str | Path) -> SparsityReport | None:
    """The report in a folder, or `None` if there is none, or no such folder.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or of a newer version.
    """
    file = Path(folder) / REPORT_FILE
    return SparsityReport.from_json(file) if file.is_file() else None


def weight_bytes(folder: str | Path) -> int:
    """What the weight files in a folder take."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def write_report(report: SparsityReport, folder: str | Path, page: bool | None = None) -> None:
    """Write the report into a folder, and its page.

    Args:
        report: The report.
        folder: An existing folder.
        page: Whether to write the page, too; by default if there is one already.

    Raises:
        OSError: A file cannot be written; what was there is unchanged.
    """
    folder = Path(folder)
    with replace_file(folder / REPORT_FILE) as file:
        report.to_json(file)
    if (folder / PAGE_FILE).is_file() if page is None else page:
        with replace_file(folder / PAGE_FILE) as file:
            report.to_html(file)
