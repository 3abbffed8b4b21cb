"""What the demo compares: every published method at two or three speeds, learned ones from bundled files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dicompile.plan import Policy
from dicompile.policies import FORA, DuCa, LearningToCache, TaylorSeer, ToCa, TokenCache, get_policy

ASSETS = Path(__file__).parent / "assets"
ROUTER = ASSETS / "l2c_router.safetensors"
PREDICTOR = ASSETS / "tokencache_predictor.safetensors"
STEPS = 50
"""Sampling steps that the learned files are for."""


@dataclass(frozen=True, slots=True)
class Method:
    """A cache policy, its family in the plot, and its name in the table."""

    family: str
    setting: str
    policy: Policy

    @property
    def name(self) -> str:
        """Family and setting."""
        return f"{self.family}, {self.setting}"


def methods(steps: int, every: bool = True) -> tuple[Method, ...]:
    """Methods for a number of sampling steps; learned ones only for the number that they were trained for.

    Args:
        steps: number of sampling steps.
        every: every method at two or three speeds, or a selection that compiles in half the time.
    """
    found = [
        *(Method("FORA", f"interval {n}", FORA(n)) for n in (2, 3, 6)),
        *(Method("ToCa", f"interval {n}", ToCa(n)) for n in ((3, 5) if every else (3,))),
        *(Method("DuCa", f"interval {n}", DuCa(n)) for n in ((3, 5) if every else (3,))),
        *(Method("TaylorSeer", f"interval {n}", TaylorSeer(n, order=2)) for n in ((2, 3, 6) if every else (3,))),
    ]
    if steps == STEPS:
        phases = ((1, 1), (3, 2)) if every else ((1, 1),)
        found += [
            *(Method("L2C", f"threshold {t:g}", LearningToCache(ROUTER, threshold=t)) for t in (0.1, 0.9)),
            *(Method("TokenCache", f"phases {a}+{b}", TokenCache(PREDICTOR, 0.9, intervals=(a, b))) for a, b in phases),
            *(Method("fitted", f"interval {n}", bundled(f"fitted_{n}")) for n in ((3, 4, 6) if every else (3,))),
            *(Method("auto", f"speedup {x}", bundled(f"auto_{x}")) for x in (3, 4, 6)),
        ]
    return tuple(found)


def bundled(name: str) -> Policy:
    """A forecast that was fitted to the demo model (`examples/fit_demo_forecast.py`)."""
    return get_policy(str(ASSETS / f"{name}.json"))
