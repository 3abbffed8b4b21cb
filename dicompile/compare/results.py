"""What a comparison found, as data."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dicompile.bench.machine import Machine
from dicompile.plan import Plan


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        kind: of its step: "full", "reuse", ...
        seconds: median over the rounds.
        cache_bytes: held after it, over all guidance contexts.
    """

    kind: str
    seconds: float
    cache_bytes: int


@dataclass(frozen=True)
class Quality:
    """How near pictures are to those of the model as it is.

    Attributes:
        psnr: decibels, mean over pictures; None where nothing differs.
        ssim: structural similarity, unitless, at most 1.
        error: L2 norm of the difference over that of the reference, unitless.
        flip: mean of the FLIP difference map, unitless, 0 for what looks alike; None where the package is missing.
    """

    psnr: float | None
    ssim: float
    error: float
    flip: float | None = None


@dataclass(frozen=True)
class Run:
    """One way to generate the pictures.

    Attributes:
        name: of the policy, or what else was done.
        is_cached: a policy was at work.
        steps: of the sampler.
        seconds: of a generation, one entry per round.
        first_seconds: until everything was compiled.
        calls: of the denoisers, in order.
        flops: operations of a generation's denoisers, of one guidance context.
        cache_bytes: that the plan holds at most for one guidance context.
        plan: what every step does; None for the model as it is.
        labels: of the sites and spans in it, "3.mlp".
        report: what the runtime has to say of the last generation.
        pictures: float32 in [0, 1], [n, 3, h, w].
        quality: against the model as it is.
        extras: what else the subject measures, by name.
    """

    name: str
    is_cached: bool
    steps: int
    seconds: tuple[float, ...]
    first_seconds: float
    calls: tuple[Call, ...]
    flops: float
    cache_bytes: int
    plan: Plan | None = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    report: str
    pictures: Tensor = field(repr=False)
    quality: Quality
    extras: dict[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds of a generation."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found.

    Attributes:
        subject: what was run, in words.
        runs: the model as it is, the compiled model without a cache, and all others by falling operations.
        refused: policies that this model cannot run, with the reason.
        machine: where it was measured.
        captions: of the pictures; may be fewer than these.
    """

    subject: str
    runs: tuple[Run, ...]
    refused: tuple[tuple[str, str], ...]
    machine: Machine
    captions: tuple[str, ...] = ()

    @property
    def baseline(self) -> Run:
        """What speedups refer to: the compiled model without a cache."""
        return self.runs[1]

    def speedup(self, run: Run) -> float:
        """Time of the compiled model without a cache over that of a run."""
        return self.baseline.median / run.median

    def flop_speedup(self, run: Run) -> float:
        """Operations of the model without a cache over those of a run."""
        return self.baseline.flops / run.flops

    def better_steps(self, run: Run) -> Run | None:
        """A run of fewer steps that is as near to the reference and takes no more operations, if there is one."""
        rivals = [r for r in self.runs[2:] if not r.is_cached]
        found = [r for r in rivals if r.flops <= run.flops and r.quality.error <= run.quality.error]
        return min(found, key=lambda rival: rival.quality.error, default=None) if run.is_cached else None

    def as_data(self) -> dict[str, Any]:
        """Figures without pictures, for JSON."""
        return {
            "subject": self.subject,
            "machine": dataclasses.asdict(self.machine),
            "refused": dict(self.refused),
            "runs": [
                {
                    "name": run.name,
                    "is_cached": run.is_cached,
                    "steps": run.steps,
                    "seconds": list(run.seconds),
                    "first_seconds": run.first_seconds,
                    "speedup": self.speedup(run),
                    "flops": run.flops,
                    "flop_speedup": self.flop_speedup(run),
                    "cache_bytes": run.cache_bytes,
                    "quality": dataclasses.asdict(run.quality),
                    "extras": run.extras,
                    "calls": [dataclasses.asdict(call) for call in run.calls],
                    "report": run.report,
                }
                for run in self.runs
            ],
        }

    def to_json(self) -> str:
        """See `as_data`."""
        return json.dumps(self.as_data(), indent=2, allow_nan=False)

    def table(self) -> Table:
        """For a terminal of 80 columns."""
        table = Table(title=self.subject, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
        table.add_column("", no_wrap=True)
        headings = ["time\ns", "speedup", "fewer\nFLOPs", "cache\nMiB", "PSNR\ndB", "SSIM", *self.runs[0].extras]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for run in self.runs:
            table.add_row(
                run.name,
                f"{run.median:.2f}",
                f"{self.speedup(run):.2f}x",
                f"{self.flop_speedup(run):.2f}x",
                f"{run.cache_bytes / 2**20:.1f}" if run.cache_bytes else "",
                decibels(run.quality.psnr),
                f"{run.quality.ssim:.3f}",
                *run.extras.values(),
                style="bold" if run.is_cached else None,
            )
        return table


def decibels(psnr: float | None) -> str:
    """PSNR as text."""
    return "exact" if psnr is None or math.isinf(psnr) else f"{psnr:.1f}"
