"""SmoothCache: every kind of branch is reused where calibration runs say that it hardly changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from dicompile.errors import InvalidPolicy, InvalidRouter
from dicompile.outside import Unreadable, from_json, read_text, shown
from dicompile.plan import Origin, Policy, Rule, SiteName, Table
from dicompile.policies.l2c import LearningToCache
from dicompile.policies.schedule_json import BRANCHES, is_column

Drifts = Mapping[str, Sequence[Sequence[float]]]
"""Of every kind of site, for every lag from 1 on: relative change of a value from each step to the one `lag` later."""
KINDS = {**BRANCHES, "attn1": "self-attention", "attn2": "cross-attention", "ff": "mlp"}
"""Names of branches in schedules that are passed around -> kinds of site; names of our own kinds hold, too."""


def SmoothCache(schedule: str | Path | Mapping[str, Sequence[int]]) -> Policy:
    """Reuse all branches of one kind where they had hardly changed in a calibration run; values are gated anew.

    Args:
        schedule: per kind of branch, ``{"attn": [1, 0, ...], "mlp": [...]}``, one 1 (compute) or 0 (reuse) for every
            step, as published files have it; or such a JSON file. Files that name single branches ("attn-0") are read
            by `LearningToCache`, and here as well. Of a recording make one with `smooth_schedule`.

    Raises:
        InvalidPolicy: this is no schedule.

    Reference:
        Liu et al., SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers,
        arXiv 2411.10510, section 2.

    Example:
        >>> SmoothCache(smooth_schedule(recording.drifts(lags=3), threshold=0.15))
    """
    source = str(schedule) if isinstance(schedule, str | Path) else "schedule"
    read = _read(Path(schedule)) if isinstance(schedule, str | Path) else schedule
    if isinstance(schedule, str | Path) and any("-" in name and name not in KINDS for name in read):
        return LearningToCache(schedule).model_copy(update={"name": f"smoothcache-{Path(schedule).stem}"})
    columns = {_kind(name, source): tuple(_steps(name, column, source)) for name, column in read.items()}
    if len({len(column) for column in columns.values()}) != 1:
        raise _no_schedule(source, "its lists are missing, or of different lengths")
    steps = len(next(iter(columns.values())))
    return Policy(
        name=f"smoothcache-{steps}",
        rules=tuple(
            Rule(sites=(kind,), do=Table(compute=tuple((bit,) for bit in column), origin=Origin(file=source)))
            for kind, column in columns.items()
        ),
    )


def smooth_schedule(drifts: Drifts, threshold: float = 0.15) -> dict[str, list[int]]:
    """A schedule that reuses as long as the drift that was seen allows it.

    From the first step on, a computed value serves as many of the next steps as its drift to the last of them is no
    more than the threshold; the first and the last step are computed.

    Args:
        drifts: of a recording, see `dicompile.Recording.drifts`. There are as many lags as steps that may be reused.
        threshold: alpha, relative; published schedules have 0.08 to 0.35.

    Reference:
        Liu et al., arXiv 2411.10510, algorithm 1, as its code has it.
    """
    return {kind: _column(lags, threshold) for kind, lags in drifts.items()}


def _column(lags: Sequence[Sequence[float]], threshold: float) -> list[int]:
    steps = len(lags[0]) + 1
    column, step = [], 0
    while step < steps:
        served = max(
            (n for n, drift in enumerate(lags, 1) if step < len(drift) and drift[step] <= threshold), default=0
        )
        column += [1, *[0] * served]
        step += 1 + served
    return [*column[: steps - 1], 1]


def _read(path: Path) -> Mapping[str, Sequence[int]]:
    try:
        read = from_json(read_text(path, InvalidRouter) if path.is_file() else b"")
    except Unreadable as error:
        raise _no_schedule(str(path), str(error)) from None
    if not isinstance(read, dict):
        raise _no_schedule(str(path), "it is not an object with one list per kind of branch")
    return read


def _kind(name: str, source: str) -> SiteName:
    kind = KINDS.get(name, name)
    if kind not in BRANCHES.values():
        raise _no_schedule(source, f"{shown(name)} is no kind of branch: {', '.join(KINDS)}")
    return cast("SiteName", kind)


def _steps(name: str, column: object, source: str) -> list[bool]:
    if not is_column(column):
        raise _no_schedule(source, f"{shown(name)} is not a list of 0 and 1")
    return [bool(entry) for entry in column]


def _no_schedule(source: str, why: str) -> InvalidPolicy:
    return InvalidPolicy(
        "this is not a schedule by kind of branch",
        where=source,
        why=why,
        fix='write {"attn": [1, 0, ...], "mlp": [1, 1, ...]} with one entry for every step',
    )
