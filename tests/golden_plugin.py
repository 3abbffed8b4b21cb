"""Plug-in for the replay of golden traces: ``meta["policy"]`` -> dicompile policy, recorded inputs -> optimized model.

Run as::

    python replay_check.py --make tests.golden_plugin:make          # compiled
    python replay_check.py --make tests.golden_plugin:make_eager    # rewritten graphs, operator by operator
    python replay_check.py --make tests.golden_plugin:make --make-train tests.golden_plugin:make_train
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import dicompile
from dicompile.analysis import ModelStructure, Site
from dicompile.capture import Role
from dicompile.plan import Cadence, Line, Policy, Refresh, Reuse, Rule, TokenScore, Window
from dicompile.runtime import Session
from dicompile.wrapper import record_of
from tests.golden_training import make_train  # noqa: F401 - replay_check.py looks for it here
from tests.models import state_of

NUMBER = r"[-+]?\d+(?:\.\d+)?"
BASES = {"attention": "attention", "kv-norm": "value-norm", "random": "random"}
KINDS = {"mlp": "mlp", "cross-attn": "cross-attention"}


def make(model: torch.nn.Module, meta: dict[str, Any]) -> Replay:
    """Callable for one case, compiled by Inductor."""
    return Replay(model, meta, "inductor")


def make_eager(model: torch.nn.Module, meta: dict[str, Any]) -> Replay:
    """Callable for one case, rewritten graphs run operator by operator."""
    return Replay(model, meta, "eager")


class Replay:
    """An optimized model that is fed the recorded inputs of one run, in a session of its own."""

    def __init__(self, model: torch.nn.Module, meta: dict[str, Any], mode: str) -> None:
        self.policy = policy_of(meta)
        timesteps = [step["timestep"] for step in meta["steps"]]
        self.model = dicompile.optimize(model, self.policy, schedule=timesteps, mode=mode)
        self.extra = meta.get("extra_kwargs", {})
        self.session = Session(keep_chosen=True)
        self.last_indices: dict[str, torch.Tensor] | None = None

    def __call__(self, inputs: Any) -> torch.Tensor:
        with dicompile.session(self.session) as self.session:
            output = self.model(**inputs, **self.extra, return_dict=False)[0]
            self.last_indices = self._indices(inputs.step)
        assert not record_of(self.model).calls.is_run  # Dynamo takes these models whole
        return output

    def _indices(self, step: int) -> dict[str, torch.Tensor]:
        """Refreshed tokens of every site that the policy may refresh; none at all is an empty set."""
        structure = dicompile.structure_of(self.model)
        chosen = {
            site: tokens
            for context in state_of(self.model).contexts.values()
            for site, tokens in context.chosen.items()
        }
        planned = dicompile.plan_of(self.model).steps[step]
        result = {}
        for site in structure.sites:
            rule = next((r for r in self.policy.rules if r.names(site, len(structure.blocks))), None)
            if rule and isinstance(rule.do, Refresh) and planned.sites[site.id].action.symbol in "t.":
                empty = torch.empty(site.shape[0], 0, dtype=torch.long)
                result[self._name(structure, site)] = chosen.get(int(site.id), empty)
        return result

    @staticmethod
    def _name(structure: ModelStructure, site: Site) -> str:
        """How traces call a site; double-stream blocks of FLUX come first, and image tokens before text tokens."""
        joint = [b for b in structure.blocks if any(s.kind.value == "joint-attention" for s in structure.sites_of(b))]
        if not joint:
            names = {kind: name for name, kind in KINDS.items()}
            return f"layer{site.block}.{names[site.kind.value]}"
        if site.kind.value == "parallel":
            return f"single.layer{site.block - len(joint)}.mlp"
        is_image = Role.LATENT in structure.streams[site.stream].roles
        return f"double.layer{site.block}.{'img' if is_image else 'txt'}_mlp"


def policy_of(meta: dict[str, Any]) -> Policy:
    """The dicompile policy that a recorded case describes."""
    described = meta["policy"]
    if described["name"] == "none":
        return dicompile.NoCache()
    if described["name"] == "fora":
        return dicompile.FORA(interval=described["period"])
    if described["name"] in ("toca", "duca") and "step_factor" in described:
        return _toca(described)
    if described["name"] == "toca" and "stream_factor" in described:
        return _toca_flux(described)
    if described["name"] == "taylorseer":
        return dicompile.TaylorSeer(described["interval"], described["max_order"], described["first_enhance"])
    if described["name"] == "l2c":
        file = Path(meta["case_dir"]) / described["router_file"]
        return dicompile.LearningToCache(file, threshold=described["threshold"])
    raise NotImplementedError(f"{described['name']} of {meta['case']} is not supported yet")


def _toca_flux(described: dict[str, Any]) -> Policy:
    bases = {"attention": "attention", "k-norm": "key-norm", "v-norm": "large-value-norm"}
    by_depth = line(described["layer_factor"].split("(")[0], "l/27")
    ratio, interval = described["fresh_ratio_R"], described["fresh_threshold_K"]
    uses_age = described["force_fresh"] == "global"
    base = described["cache_type"]
    score = TokenScore(base=bases.get(base, base), age_weight=described["soft_fresh_weight"] if uses_age else 0.0)

    def refresh(stream: str) -> Refresh:
        factor = described["stream_factor"][stream]
        return Refresh(ratio=ratio, factor=factor, by_depth=by_depth, depth_denominator=27, score=score)

    return Policy(
        name="golden",
        cadence=Cadence(interval=interval, counting="up", anchor="last", warmup=3 if ratio else 1),
        rules=(
            Rule(sites=("joint-attention",), do=Reuse(what="attention")),
            Rule(sites=("mlp",), do=refresh("double")),
            Rule(sites=("parallel",), do=refresh("single")),
        ),
    )


def _toca(described: dict[str, Any]) -> Policy:
    has_cross = "cross-attn" in described["module_factor"]
    grid = described["grid"] or {"cell": 0, "bonus": 0.0}
    uses_age = described["force_fresh"] == "global"
    base = "entropy" if has_cross and described["cache_type"] == "attention" else BASES[described["cache_type"]]
    score = TokenScore(
        base=base,
        age_weight=described["soft_fresh_weight"] if uses_age else 0.0,
        grid_cell=grid["cell"],
        grid_bonus=grid["bonus"],
        share_guidance=has_cross or base == "random",
    )
    rules = [
        Rule(
            sites=(KINDS[module],),
            do=Refresh(
                ratio=described["fresh_ratio_R"],
                factor=factor,
                by_step=line(described["step_factor"], "s/T"),
                by_depth=line(described["layer_factor"], "l/27"),
                depth_denominator=27,
                score=score,
            ),
        )
        for module, factor in described["module_factor"].items()
    ]
    aggressive = [Rule(sites=("stack",), when="even", do=Reuse(what="stream"))] if described["name"] == "duca" else []
    return Policy(name="golden", cadence=cadence(described), rules=(*aggressive, *rules, Rule(do=Reuse())))


def line(text: str, variable: str) -> Line:
    """``"3-4*s/T"`` -> Line(start=3, slope=-4)."""
    match = re.fullmatch(rf"({NUMBER})(?:({NUMBER})\*{variable}|([-+]){variable})?", text.replace(" ", ""))
    assert match, f"cannot read {text!r}"
    slope = match[2] or (match[3] and match[3] + "1") or "0"
    return Line(start=float(match[1]), slope=float(slope))


def cadence(described: dict[str, Any]) -> Cadence:
    """Which steps are full, from the rule in words."""
    rule = described["interval_rule"].replace(" ", "")
    refreshes = described["fresh_ratio_R"] != 0
    weight = re.search(rf"w=({NUMBER})", rule)
    stretch = float(weight[1]) if weight and (refreshes or "0ifR=0" not in rule) else 0.0
    if "1-w+2w" in rule:
        stretch = -stretch
    dense = re.search(rf"({NUMBER})ifR!=0andint\(({NUMBER})T\)<=s<int\(({NUMBER})T\)", rule)
    window = Window(interval=int(dense[1]), start=float(dense[2]), end=float(dense[3])) if dense and refreshes else None
    return Cadence(
        interval=described["fresh_threshold_K"],
        counting="down" if "down" in described["index"] else "up",
        stretch=stretch,
        dense=window,
        decide="block" if described.get("interval_written_by") else "step",
    )
