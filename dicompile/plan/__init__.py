"""Plan: structure x policy x timestep schedule -> what every site does at every step, and what must be remembered."""

from dicompile.plan.action import (
    COMPUTE,
    HISTORIC,
    REUSE,
    SKIP,
    Action,
    Context,
    Score,
    ScoreBase,
    Selection,
    Slot,
    SlotKind,
    What,
)
from dicompile.plan.cadence import Cadence, Magnitudes, Window
from dicompile.plan.fits import (
    SAME_TIMESTEP,
    check_fits,
    check_gate,
    check_parameters,
    check_predictor,
    choose_setting,
    first_span,
    score_source,
)
from dicompile.plan.frozen import Origin
from dicompile.plan.gate import Gate
from dicompile.plan.memory import DTYPES, UNLIMITED, CacheOptions, check_can_compile, needs_scale
from dicompile.plan.plan import Dropped, Plan, SiteStep, StepPlan
from dicompile.plan.planner import attention_owner, make_plan, plan_actions, recording_plan, reusing_plan
from dicompile.plan.predictor import Predictor, PredictorFacts, load_predictor
from dicompile.plan.recall import Fitted, Forecast, Reuse, Spectral, WhatName
from dicompile.plan.rows import make_rows
from dicompile.plan.schedule import TimestepSchedule
from dicompile.plan.schema import (
    Elsewhere,
    Line,
    Policy,
    Refresh,
    Rule,
    SiteName,
    Table,
    TokenScore,
    TokenTable,
)
from dicompile.plan.weights import chebyshev_weights, polynomial_weights, taylor_weights

__all__ = [
    "COMPUTE",
    "DTYPES",
    "HISTORIC",
    "REUSE",
    "SAME_TIMESTEP",
    "SKIP",
    "UNLIMITED",
    "Action",
    "CacheOptions",
    "Cadence",
    "Context",
    "Dropped",
    "Elsewhere",
    "Fitted",
    "Forecast",
    "Gate",
    "Line",
    "Magnitudes",
    "Origin",
    "Plan",
    "Policy",
    "Predictor",
    "PredictorFacts",
    "Refresh",
    "Reuse",
    "Rule",
    "Score",
    "ScoreBase",
    "Selection",
    "SiteName",
    "SiteStep",
    "Slot",
    "SlotKind",
    "Spectral",
    "StepPlan",
    "Table",
    "TimestepSchedule",
    "TokenScore",
    "TokenTable",
    "What",
    "WhatName",
    "Window",
    "attention_owner",
    "chebyshev_weights",
    "check_can_compile",
    "check_fits",
    "check_gate",
    "check_parameters",
    "check_predictor",
    "choose_setting",
    "first_span",
    "load_predictor",
    "make_plan",
    "make_rows",
    "needs_scale",
    "plan_actions",
    "polynomial_weights",
    "recording_plan",
    "reusing_plan",
    "score_source",
    "taylor_weights",
]
