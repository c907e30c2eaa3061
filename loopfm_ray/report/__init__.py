"""One self-contained HTML page, and a table for the terminal, from the records of a run."""

from loopfm_ray.report.page import build_report, render_report
from loopfm_ray.report.table import write_table

__all__ = ["build_report", "render_report", "write_table"]
