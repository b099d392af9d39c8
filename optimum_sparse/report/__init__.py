"""What pruning did to a model: a record as JSON and as a table."""

from .record import MatrixReport, SparsityReport

__all__ = ["MatrixReport", "SparsityReport"]
