"""Gates at run time: how far the probe has drifted, and what a context remembers of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from dicompile.plan import Aligned, Gate
from dicompile.runtime.given import Given

EPSILON = 1e-10
"""What a computed value is taken for at least, where an error is divided by it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a gate said at one call.

    Attributes:
        drift: what was held against the threshold: rescaled, and added up if the gate does that; None where its limits
            left nothing to decide, or nothing has been compared.
        recalls: whether the step recalls.
        sample: of the batch, about which it was said; None for all of them.
    """

    drift: float | None
    recalls: bool
    sample: int | None = None


@dataclass
class Drift:
    """What one context remembers of its gate.

    Attributes:
        full: steps that computed everything, the latest first.
        total: rescaled drift added up since the latest of them.
        run: steps since then, all of which recalled.
        recalled: steps of the run that recalled.
        output: mean size of the model's output at the latest full step, where the gate measures it; on the device.
        rate: how far that had moved since the full step before, over how far the probe had.
        weights: of the last two stored values, with a 0 before them, where they follow from what the gate watches.
        result: what the model has returned at the latest full step, and for which latent, where partners read it.
        is_paired: a partner was there at the latest full step.
        error: of the latest recalled step that was verified since the latest full one; on the device.
    """

    full: tuple[int, ...] = ()
    total: float = 0.0
    run: int = 0
    recalled: int = 0
    output: torch.Tensor | None = None
    rate: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    result: tuple[torch.Tensor, Given] | None = None
    is_paired: bool = False
    error: torch.Tensor | None = None

    def moved(
        self, gate: Gate, probe: torch.Tensor, reference: torch.Tensor, first: Decision | None
    ) -> torch.Tensor | Decision:
        """How far the probe has drifted, on the device; or a decision, where that does not matter.

        Args:
            gate: of the policy.
            probe: its value at this step.
            reference: what it is compared with.
            first: what a guidance partner has decided at this step, if that holds for this one, too.
        """
        if not gate.may_recall(self.run, self.recalled):
            return Decision(None, recalls=False)
        if first is not None:
            return first
        if gate.must_recall(self.run):
            return Decision(None, recalls=True)
        if gate.relative_to == "probe":
            return drift_of(probe, reference)
        if self.rate is None or self.output is None:
            return Decision(None, recalls=False)
        return drift_of(probe, reference, self.output / self.rate)

    def missed(self, gate: Gate) -> torch.Tensor | Decision:
        """How far off the recalled step before was, on the device; or a decision, where that is not known."""
        if not gate.may_recall(self.run, self.recalled):
            return Decision(None, recalls=False)
        if gate.must_recall(self.run) or self.error is None:
            return Decision(None, recalls=True)
        return self.error

    def decision(self, gate: Gate, drift: float, share: float) -> Decision:
        """Hold a drift against the threshold.

        Args:
            gate: of the policy.
            drift: unitless, neither rescaled nor added up.
            share: of the run that is over with this step.
        """
        drift = gate.rescaled(drift) + (self.total if gate.accumulates else 0.0)
        return Decision(drift, drift < gate.limit(self.run, share))

    def wait(self, gate: Gate, *, is_there: bool) -> Decision:
        """Decide about a step by whether a guidance partner is there; waits for nothing."""
        return Decision(None, is_there and self.is_paired and gate.may_recall(self.run, self.recalled))

    def verify(self, recalled: torch.Tensor, computed: torch.Tensor) -> None:
        """Note how far off a recalled stream is; waits for nothing."""
        recalled, computed = recalled.float(), computed.float()
        self.error = ((recalled - computed).abs() / (computed.abs() + EPSILON)).mean()

    def measure(self, now: Anchors, before: Anchors | None) -> None:
        """Note how far the output has moved with the probe, after a full step; waits for nothing.

        Args:
            now: of this step.
            before: of the full step before it, if there was one.
        """
        self.output = _mean(now.output)
        if before is not None:
            self.rate = _mean(now.output - before.output) / _mean(now.probe - before.probe)

    def align(self, recall: Aligned, trace: torch.Tensor, stored: Sequence[torch.Tensor]) -> None:
        """Note how far what is watched has gone; waits for nothing.

        Args:
            recall: limits.
            trace: what the first blocks add at this step.
            stored: what they added at the last two full steps, newest first.
        """
        last, before = stored
        way = (_mean(trace - before) / _mean(last - before)).clamp(recall.least, recall.most)
        self.weights = torch.stack((torch.zeros_like(way), way, 1 - way))

    def take(self, decision: Decision) -> None:
        """Add up what a decision has found."""
        self.total = decision.drift or 0.0

    def follow(self, step: int, *, recalls: bool) -> None:
        """Note that a step is done."""
        if recalls:
            self.run, self.recalled = self.run + 1, self.recalled + 1
        else:
            self.full, self.total, self.run, self.error = (step, *self.full), 0.0, 0, None


class Anchors(NamedTuple):
    """What is compared from one full step to the next.

    Attributes:
        probe: its value.
        output: what the model returns.
    """

    probe: torch.Tensor
    output: torch.Tensor


def decide(
    gate: Gate, drifts: Sequence[Drift], found: Sequence[torch.Tensor | Decision], share: float
) -> list[Decision]:
    """Decide about a step; waits for the device once, unless there is nothing to decide.

    Args:
        gate: of the policy.
        drifts: of all who decide for themselves.
        found: by each, how far it has drifted, 0-d; or what was decided without that.
        share: of the run that is over with this step.
    """
    asked = [value for value in found if isinstance(value, torch.Tensor)]
    numbers = iter(numbers_of(asked) if asked else ())
    return [
        drift.decision(gate, next(numbers), share) if isinstance(value, torch.Tensor) else value
        for drift, value in zip(drifts, found, strict=True)
    ]


def numbers_of(values: Sequence[torch.Tensor]) -> list[float]:
    """Values that are 0-d; waits for the device."""
    return cast("list[float]", torch.stack([*values]).tolist())


def drift_of(probe: torch.Tensor, reference: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
    """Mean distance of two values over a size, or the mean size of the second; 0-d, waits for nothing."""
    return _mean(probe - reference) / (_mean(reference) if size is None else size)


def _mean(value: torch.Tensor) -> torch.Tensor:
    return value.abs().mean(dtype=torch.float32)
