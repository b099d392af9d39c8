"""What pruning did to a model and what was measured of it: as JSON, as a table, as a page."""

from .pictures import Picture, take_pictures
from .record import REPORT_FILE, MatrixReport, SparsityReport

__all__ = ["REPORT_FILE", "MatrixReport", "Picture", "SparsityReport", "take_pictures"]
