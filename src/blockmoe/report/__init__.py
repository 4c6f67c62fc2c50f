"""Reports from traces alone: no GPU and no torch is needed to read what was measured."""

from blockmoe.report.api import best, show, terminal_table, watch, write
from blockmoe.report.importing import import_csv
from blockmoe.report.load import ReportError

__all__ = ["ReportError", "best", "import_csv", "show", "terminal_table", "watch", "write"]
