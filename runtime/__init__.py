"""Runtime: per call, which step it is, which program runs, what is remembered. Knows no graphs."""

from dicompile.runtime import kernels, streams
from dicompile.runtime.clock import SchedulerLink
from dicompile.runtime.execute import Executor
from dicompile.runtime.graphs import Graphs, recorder_of
from dicompile.runtime.identify import Signature
from dicompile.runtime.invariants import Tables
from dicompile.runtime.observe import Observer, Seen
from dicompile.runtime.owner import Owner, Owners
from dicompile.runtime.report import CallReport, RunReport
from dicompile.runtime.rows import Batch
from dicompile.runtime.session import Session, cache_context, current_session, session
from dicompile.runtime.steps import GatedStep, Step, StepSource
from dicompile.runtime.storage import run_calls

__all__ = [
    "Batch",
    "CallReport",
    "Executor",
    "GatedStep",
    "Graphs",
    "Observer",
    "Owner",
    "Owners",
    "RunReport",
    "SchedulerLink",
    "Seen",
    "Session",
    "Signature",
    "Step",
    "StepSource",
    "Tables",
    "cache_context",
    "current_session",
    "kernels",
    "recorder_of",
    "run_calls",
    "session",
    "streams",
]
