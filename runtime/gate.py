"""Gates at run time: how far the probe has drifted, and what a context remembers of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dicompile.plan import Gate


@dataclass(frozen=True, slots=True)
class Decision:
    """What a gate said at one call.

    Attributes:
        drift: what was held against the threshold: rescaled, and added up if the gate does that; None where its limits
            left nothing to decide.
        recalls: whether the step recalls.
    """

    drift: float | None
    recalls: bool


@dataclass
class Drift:
    """What one context remembers of its gate.

    Attributes:
        full: steps that computed everything, the latest first.
        total: rescaled drift added up since the latest of them.
        run: steps since then, all of which recalled.
        recalled: steps of the run that recalled.
    """

    full: tuple[int, ...] = ()
    total: float = 0.0
    run: int = 0
    recalled: int = 0

    def decide(self, gate: Gate, probe: torch.Tensor, reference: torch.Tensor) -> Decision:
        """Decide about a step; waits for the device, unless the gate's limits leave nothing to decide.

        Args:
            gate: of the policy.
            probe: its value at this step.
            reference: what it is compared with.
        """
        if not gate.may_recall(self.run, self.recalled):
            return Decision(None, recalls=False)
        drift = gate.rescaled(drift_of(probe, reference)) + (self.total if gate.accumulates else 0.0)
        return Decision(drift, drift < gate.limit(self.run))

    def take(self, decision: Decision) -> None:
        """Add up what a decision has found."""
        self.total = decision.drift or 0.0

    def follow(self, step: int, *, recalls: bool) -> None:
        """Note that a step is done."""
        if recalls:
            self.run, self.recalled = self.run + 1, self.recalled + 1
        else:
            self.full, self.total, self.run = (step, *self.full), 0.0, 0


def drift_of(probe: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean distance of two values over the mean size of the second; waits for the device."""
    distance = (probe - reference).abs().mean(dtype=torch.float32)
    return float(distance / reference.abs().mean(dtype=torch.float32))
