"""Plan: structure x policy x timestep schedule -> what every site does at every step, and what must be remembered."""

from dicompile.plan.action import COMPUTE, REUSE, Action, Score, ScoreBase, Selection, Slot, SlotKind, What
from dicompile.plan.plan import Plan, SiteStep, StepPlan
from dicompile.plan.planner import cold_step, make_plan, plan_actions
from dicompile.plan.policy import Cadence, Line, Policy, Refresh, Reuse, Rule, TokenScore, Window
from dicompile.plan.schedule import TimestepSchedule

__all__ = [
    "COMPUTE",
    "REUSE",
    "Action",
    "Cadence",
    "Line",
    "Plan",
    "Policy",
    "Refresh",
    "Reuse",
    "Rule",
    "Score",
    "ScoreBase",
    "Selection",
    "SiteStep",
    "Slot",
    "SlotKind",
    "StepPlan",
    "TimestepSchedule",
    "TokenScore",
    "What",
    "Window",
    "cold_step",
    "make_plan",
    "plan_actions",
]
