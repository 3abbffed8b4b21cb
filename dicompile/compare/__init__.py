"""Policies beside each other on the user's own pictures: time, memory, likeness, and a report that opens anywhere."""

from dicompile.compare.measure import compare
from dicompile.compare.report import write_report
from dicompile.compare.results import Call, Comparison, Quality, Run
from dicompile.compare.subjects import ModuleSubject, PipelineSubject, Subject

__all__ = [
    "Call",
    "Comparison",
    "ModuleSubject",
    "PipelineSubject",
    "Quality",
    "Run",
    "Subject",
    "compare",
    "write_report",
]
