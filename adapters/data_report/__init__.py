"""What is wrong with a data set, before anything is trained on it: `make_report`. Knows no tenant, HTTP or SQL."""

from adapters.data_report.finding import DataReport, Finding, Severity
from adapters.data_report.hits import Limits
from adapters.data_report.report import Base, Source, Tools, make_report

__all__ = ["Base", "DataReport", "Finding", "Limits", "Severity", "Source", "Tools", "make_report"]
