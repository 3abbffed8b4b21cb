"""Tiny models captured once for many tests, and their programs without anything compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import Capture
from dicompile.compiler import Options, Programs
from dicompile.lower import Backend, Pieces
from dicompile.policies import get_policy
from dicompile.runtime import SchedulerLink
from tests.models import Sample, capture


@dataclass(frozen=True)
class Captured:
    """A sample that was captured and analysed."""

    sample: Sample
    capture: Capture
    structure: ModelStructure

    def programs(self, policy: Any) -> Programs:
        """Plans and programs of variants that run operator by operator."""
        return Programs(
            Pieces(self.capture, self.structure), Options(get_policy(policy), SchedulerLink(1), Backend("eager"))
        )

    def arguments(self, **inputs: Any) -> list[Any]:
        """A value for every input of the captured graph; `inputs` replace those of the sample."""
        model = self.sample.model
        given = {**dict(model.named_parameters()), **dict(model.named_buffers()), **self.sample.inputs, **inputs}
        return [given[item.name] for item in self.capture.inputs]


@functools.cache
def captured(make: Callable[..., Sample], *layers: int) -> Captured:
    """The model that `make` makes; made once."""
    sample = make(*layers)
    made = capture(sample)
    return Captured(sample, made, analyse(made))
