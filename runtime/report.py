"""What happened since the last generation began."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class RunReport:
    """Counts of one generation, over all guidance contexts.

    Attributes:
        kinds: calls by kind of step.
        cold_starts: calls that computed everything because nothing was remembered, with the step.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    cold_starts: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        cold = f"; computed for want of stored values at steps {self.cold_starts}" if self.cold_starts else ""
        return f"{self.kinds.total()} calls: {kinds}{cold}"
