"""Runtime: per call, which step it is, which program runs, what is remembered. Knows no graphs."""

from dicompile.runtime.clock import SchedulerLink
from dicompile.runtime.dispatch import Executor, ProgramSource
from dicompile.runtime.report import RunReport
from dicompile.runtime.session import Session, cache_context, current_session, session

__all__ = [
    "Executor",
    "ProgramSource",
    "RunReport",
    "SchedulerLink",
    "Session",
    "cache_context",
    "current_session",
    "session",
]
