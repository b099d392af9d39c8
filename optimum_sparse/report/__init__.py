"""What pruning did to a model and what was measured of it: as JSON, as a table, as a page."""

from .files import PAGE_FILE, REPORT_FILE, read_report, write_report
from .pictures import Picture, take_pictures
from .record import MatrixReport, SparsityReport

__all__ = [
    "PAGE_FILE",
    "REPORT_FILE",
    "MatrixReport",
    "Picture",
    "SparsityReport",
    "read_report",
    "take_pictures",
    "write_report",
]
