"""Every mistake a user can make, as one class each: what happened, where, why, and how to fix it.

What is wrong about an argument, a setting or a file is a ValueError, too; what is wrong about the state of a model or
about its code is a RuntimeError.
"""

from __future__ import annotations

import functools
from typing import Any


class DicompileError(Exception):
    """Base of all errors that dicompile raises on purpose.

    Args:
        what: the failure in one line.
        where: stage, file or step in which it was noticed.
        why: the fact that forbids it.
        fix: what to write instead.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        details = (("where", where), ("why", why), ("fix", fix))
        super().__init__("\n".join([what, *(f"  {name + ':':<6} {text}" for name, text in details if text)]))

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle and copy make the error again: its arguments have names, which exceptions forget."""
        make = functools.partial(type(self), where=self.where, why=self.why, fix=self.fix)
        return make, (self.what,), vars(self)


class UnknownPolicy(DicompileError, ValueError):
    """No policy goes by this name."""


class InvalidPolicy(DicompileError, ValueError):
    """A policy has an unknown option or a value outside its range."""


class PolicyDoesNotFit(DicompileError, ValueError):
    """The policy asks for something that this model cannot do."""


class InvalidPredictor(DicompileError, ValueError):
    """A file holds no cache predictor that could be read."""


class InvalidRouter(DicompileError, ValueError):
    """A file holds no router that could be read, or only part of one."""


class InvalidTrainingData(DicompileError, ValueError):
    """Latents or trajectories to train on lack something, or do not go together."""


class InvalidRecording(DicompileError, ValueError):
    """A recording is damaged, empty, or of another model, sampler or shape than it is used for."""


class InvalidTiming(DicompileError, ValueError):
    """Times of steps are damaged, incomplete, or of another model, shape, dtype or device than they are used for."""


class CacheTooLarge(DicompileError, ValueError):
    """A plan needs more memory than it may have."""


class NoSitesFound(DicompileError, ValueError):
    """The model has no residual branch that could be cached."""


class TimestepNotFound(DicompileError, ValueError):
    """Which input of the model is the timestep cannot be told."""


class InvalidSchedule(DicompileError, ValueError):
    """The timestep schedule is missing or makes no sense."""


class CallOutsideSchedule(DicompileError, RuntimeError):
    """The model was called at a timestep, or more often, than its schedule says."""


class CannotCapture(DicompileError, RuntimeError):
    """The model's graph cannot be turned into functional ATen."""


class UnsupportedCall(DicompileError, RuntimeError):
    """An optimized model was differentiated, transformed or traced."""


class CannotBatch(DicompileError, ValueError):
    """Calls of several requests cannot be one call of the model, or rows of one call be told apart."""


class RequestEnded(DicompileError, RuntimeError):
    """A request was cancelled, or closed, and its model was called nevertheless."""


class RequestTimedOut(RequestEnded, TimeoutError):
    """A request took longer than it may."""


class NotOptimized(DicompileError, RuntimeError):
    """The object given was not returned by `dicompile.optimize`."""


class AlreadyOptimized(DicompileError, RuntimeError):
    """The object given was optimized before."""


class NotYetRun(DicompileError, RuntimeError):
    """Structure and plan of a model are known after its first call."""


class UnsupportedModel(DicompileError, ValueError):
    """The object given is neither a module nor a pipeline with a denoiser."""


class UnsupportedParallelism(DicompileError, ValueError):
    """Ranks that need each other could take different steps."""


class PlansDiffer(DicompileError, RuntimeError):
    """Ranks that run one model together have made different plans."""


class InvalidSetting(DicompileError, ValueError):
    """An environment variable or a backend option has an unknown value."""


class IllegalGraph(DicompileError, RuntimeError):
    """A pass left a graph that the next stage does not accept (a bug in dicompile)."""


class StaleRead(DicompileError, RuntimeError):
    """A step wanted a slot that nobody wrote (a bug in dicompile)."""
