"""What a person looks at after a run."""

from anychip.report.page import write_report

__all__ = ["write_report"]
