"""One page of everything that is known about an output."""

from ckptavg.report.write import ReportResult, write_report

__all__ = ["ReportResult", "write_report"]
