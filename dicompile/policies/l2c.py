"""Learning-to-Cache: in every second step, a learned table says which branches are reused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from dicompile.errors import InvalidPolicy, InvalidRouter
from dicompile.outside import read_text
from dicompile.plan import Forecast, Origin, Policy, Reuse, Rule, Table
from dicompile.policies.router import Router
from dicompile.policies.router_file import load_router
from dicompile.policies.schedule_json import schedule_from_json


def LearningToCache(
    router: Router | str | Path, threshold: float | None = None, otherwise: Literal["reuse"] | int = "reuse"
) -> Policy:
    """Reuse the branches that a trained router scores low; values are stored before their gates and gated anew.

    Steps come in pairs: one that computes everything, then one that reuses what the router allows.

    Args:
        router: a router, its file (`dicompile train-router` or a published checkpoint), or a JSON schedule.
        threshold: sites with a score above it are computed; the router's own if None. Larger values cache more.
        otherwise: "reuse", as published, or the order of a forecast from what full steps stored.

    Raises:
        InvalidRouter: the file is damaged or something else, or the threshold is not in [0, 1).
        InvalidPolicy: a threshold for a JSON schedule, which holds no scores, or no order of a forecast.

    Reference:
        Ma et al., Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching, NeurIPS 2024,
        arXiv 2406.01733, section 3.3.
    """
    if isinstance(router, str | Path) and Path(router).suffix == ".json":
        compute, origin = _read_schedule(Path(router), threshold)
    else:
        router = router if isinstance(router, Router) else load_router(router)
        compute = router.schedule(threshold)
        origin = Origin(file=router.source, sites=router.facts.sites, timesteps=router.facts.timesteps)
    rows = tuple(tuple(row) for row in compute.tolist())
    recall = Reuse() if otherwise == "reuse" else Forecast(order=otherwise)
    return Policy(name=f"l2c-{len(rows)}", rules=(Rule(do=Table(compute=rows, otherwise=recall, origin=origin)),))


def _read_schedule(path: Path, threshold: float | None) -> tuple[Tensor, Origin]:
    if threshold is not None:
        raise InvalidPolicy(
            "a threshold is given, but the router is a schedule without scores",
            where=str(path),
            fix="leave the threshold out, or give the router itself",
        )
    compute, sites = schedule_from_json(read_text(path, InvalidRouter) if path.is_file() else b"", str(path))
    return compute, Origin(file=str(path), sites=sites)
