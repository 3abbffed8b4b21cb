"""Every mistake a user can make, as one class each: what happened, where, why, and how to fix it."""

from __future__ import annotations


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


class UnknownPolicy(DicompileError):
    """No policy goes by this name."""


class InvalidPolicy(DicompileError):
    """A policy has an unknown option or a value outside its range."""


class PolicyDoesNotFit(DicompileError):
    """The policy asks for something that this model cannot do."""


class InvalidPredictor(DicompileError):
    """A file holds no cache predictor that could be read."""


class InvalidRouter(DicompileError):
    """A file holds no router that could be read, or only part of one."""


class InvalidTrainingData(DicompileError):
    """A file of latents to train on lacks something, or its tensors do not go together."""


class CacheTooLarge(DicompileError):
    """A plan needs more memory than it may have."""


class NoSitesFound(DicompileError):
    """The model has no residual branch that could be cached."""


class InvalidSchedule(DicompileError):
    """The timestep schedule is missing or makes no sense."""


class CallOutsideSchedule(DicompileError):
    """The model was called at a timestep, or more often, than its schedule says."""


class CannotCapture(DicompileError):
    """The model's graph cannot be turned into functional ATen."""


class NotOptimized(DicompileError):
    """The object given was not returned by `dicompile.optimize`."""


class AlreadyOptimized(DicompileError):
    """The object given was optimized before."""


class NotYetRun(DicompileError):
    """Structure and plan of a model are known after its first call."""


class UnsupportedModel(DicompileError):
    """The object given is neither a module nor a pipeline with a denoiser."""


class InvalidSetting(DicompileError):
    """An environment variable or a backend option has an unknown value."""


class IllegalGraph(DicompileError):
    """A pass left a graph that the next stage does not accept (a bug in dicompile)."""


class StaleRead(DicompileError):
    """A step wanted a slot that nobody wrote (a bug in dicompile)."""
