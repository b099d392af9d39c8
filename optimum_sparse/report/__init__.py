"""What pruning did to a model and what was measured of it: as JSON, as a table, as a page."""

from .comparison import Comparison, compare_reports
from .files import PAGE_FILE, REPORT_FILE, read_report, weight_bytes, write_report
from .pictures import Picture, take_pictures
from .record import MatrixReport, SparsityReport

__all__ = [
    "PAGE_FILE",
    "REPORT_FILE",
    "Comparison",
    "MatrixReport",
    "Picture",
    "SparsityReport",
    "compare_reports",
    "read_report",
    "take_pictures",
    "weight_bytes",
    "write_report",
]
