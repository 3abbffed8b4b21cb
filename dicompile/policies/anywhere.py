"""Published names on any model: every kind of model gets the setting that was published for its kind.

``"toca"`` is the setting for class-conditional DiT on one, that for PixArt on a model with cross-attention, and so on;
on a model that none of them fits, tokens are chosen at random, and branches that mix tokens are reused whole. With
options a name means the function that takes them.
"""

from __future__ import annotations

from dicompile.plan import Elsewhere, Policy
from dicompile.policies.duca import DuCa, DuCaFlux, DuCaOpenSora, DuCaPixArt
from dicompile.policies.toca import ToCa, ToCaFlux, ToCaOpenSora, ToCaPixArt


def toca_anywhere() -> Policy:
    """ToCa in the setting published for the kind of model that it meets."""
    plain = ToCa(score="random", grid_cell=0)
    return _anywhere(ToCa(), ToCaFlux(), ToCaOpenSora(), ToCaPixArt(), plain)


def duca_anywhere() -> Policy:
    """DuCa in the setting published for the kind of model that it meets; without one it reuses updates."""
    plain = DuCa(score="random", grid_cell=0, aggressive="update")
    return _anywhere(DuCa(), DuCaFlux(), DuCaOpenSora(), DuCaPixArt(), plain)


def _anywhere(main: Policy, joint: Policy, film: Policy, text: Policy, plain: Policy) -> Policy:
    others = (
        Elsewhere(sites=("joint-attention",), policy=joint),
        Elsewhere(sites=("parallel",), policy=joint),  # attention and MLP of one add, as in the second half of FLUX
        Elsewhere(sites=("self-attention", "cross-attention"), grid_axes=3, policy=film),
        Elsewhere(sites=("self-attention", "cross-attention"), policy=text),
        Elsewhere(policy=plain.model_copy(update={"name": f"{plain.name}-random", "where_mixed": "reuse"})),
    )
    return main.model_copy(update={"elsewhere": others})
