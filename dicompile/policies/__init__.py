"""Published caching methods, one short file each: a function that returns a `Policy` and cites its paper."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from dicompile.errors import InvalidPolicy, UnknownPolicy
from dicompile.outside import read_text
from dicompile.plan import Policy, Predictor, load_predictor
from dicompile.policies.anywhere import duca_anywhere, toca_anywhere
from dicompile.policies.clusca import ClusCa
from dicompile.policies.delta_dit import DeltaDiT
from dicompile.policies.dicache import DiCache
from dicompile.policies.duca import DuCa, DuCaFlux, DuCaOpenSora, DuCaPixArt
from dicompile.policies.easycache import EasyCache
from dicompile.policies.fastercache import FasterCache
from dicompile.policies.first_block import DBCache, FirstBlockCache
from dicompile.policies.fora import FORA
from dicompile.policies.freqca import FreqCa
from dicompile.policies.guidance import GuidanceReuse
from dicompile.policies.hicache import HiCache
from dicompile.policies.l2c import LearningToCache
from dicompile.policies.l2p import L2P
from dicompile.policies.magcache import MagCache
from dicompile.policies.meancache import MeanCache
from dicompile.policies.none import NoCache
from dicompile.policies.pab import PAB
from dicompile.policies.router import Router, RouterFacts
from dicompile.policies.router_file import load_router, save_router
from dicompile.policies.schedule_json import schedule_from_json, schedule_to_json
from dicompile.policies.smoothcache import SmoothCache, smooth_schedule
from dicompile.policies.speca import SpeCa
from dicompile.policies.spectrum import Spectrum
from dicompile.policies.taylorseer import TaylorSeer, TaylorSeerLite
from dicompile.policies.teacache import TeaCache
from dicompile.policies.toca import ToCa, ToCaFlux, ToCaOpenSora, ToCaPixArt
from dicompile.policies.tokencache import TokenCache
from dicompile.text import near_names

__all__ = [
    "FORA",
    "L2P",
    "PAB",
    "POLICIES",
    "ClusCa",
    "DBCache",
    "DeltaDiT",
    "DiCache",
    "DuCa",
    "DuCaFlux",
    "DuCaOpenSora",
    "DuCaPixArt",
    "EasyCache",
    "FasterCache",
    "FirstBlockCache",
    "FreqCa",
    "GuidanceReuse",
    "HiCache",
    "LearningToCache",
    "MagCache",
    "MeanCache",
    "NoCache",
    "Predictor",
    "Router",
    "RouterFacts",
    "SmoothCache",
    "SpeCa",
    "Spectrum",
    "TaylorSeer",
    "TaylorSeerLite",
    "TeaCache",
    "ToCa",
    "ToCaFlux",
    "ToCaOpenSora",
    "ToCaPixArt",
    "TokenCache",
    "get_policy",
    "load_predictor",
    "load_router",
    "required_options",
    "save_router",
    "schedule_from_json",
    "schedule_to_json",
    "smooth_schedule",
]

POLICIES: dict[str, Callable[..., Policy]] = {
    "none": NoCache,
    "fora": FORA,
    "toca": ToCa,
    "toca-pixart": ToCaPixArt,
    "toca-opensora": ToCaOpenSora,
    "toca-flux": ToCaFlux,
    "duca": DuCa,
    "duca-pixart": DuCaPixArt,
    "duca-opensora": DuCaOpenSora,
    "duca-flux": DuCaFlux,
    "taylorseer": TaylorSeer,
    "clusca": ClusCa,
    "tokencache": TokenCache,
    "taylorseer-lite": TaylorSeerLite,
    "hicache": HiCache,
    "spectrum": Spectrum,
    "freqca": FreqCa,
    "meancache": MeanCache,
    "l2p": L2P,
    "first-block-cache": FirstBlockCache,
    "dbcache": DBCache,
    "teacache": TeaCache,
    "easycache": EasyCache,
    "dicache": DiCache,
    "speca": SpeCa,
    "guidance-reuse": GuidanceReuse,
    "delta-dit": DeltaDiT,
    "magcache": MagCache,
    "pab": PAB,
    "fastercache": FasterCache,
    "smoothcache": SmoothCache,
    "l2c": LearningToCache,
}

ANYWHERE: dict[str, Callable[[], Policy]] = {"toca": toca_anywhere, "duca": duca_anywhere}
"""What a name means that comes without options."""


def get_policy(source: Policy | str | dict[str, Any], **options: Any) -> Policy:
    """Policy from itself, a published name with options, plain data, or the path of a YAML or JSON file.

    "toca" and "duca" without options are the setting published for the kind of model that they meet.

    Raises:
        UnknownPolicy: no policy and no file has this name.
        InvalidPolicy: an option is unknown, missing or out of range, or given beside a policy that is complete without.
    """
    if options and (not isinstance(source, str) or source not in POLICIES):
        raise InvalidPolicy(
            f"options are given, but the policy is not a published name: {', '.join(options)}",
            where="get_policy",
            fix="change the policy itself",
        )
    if isinstance(source, Policy):
        return source
    if isinstance(source, dict):
        return Policy.from_dict(source)
    if source in POLICIES:
        return _call(source, options)
    path = Path(source)
    if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
        read = Policy.from_json if path.suffix == ".json" else Policy.from_yaml
        return read(read_text(path, InvalidPolicy), source)
    near = near_names(path.stem, POLICIES)
    raise UnknownPolicy(
        f"no policy is called {source!r}",
        why="it is neither a published name nor an existing .yaml or .json file",
        fix=(f"did you mean {near}? " if near else "") + f"use one of: {', '.join(POLICIES)}",
    )


def required_options(name: str) -> tuple[str, ...]:
    """Options without which a published policy cannot be made: the file that somebody trained for the model."""
    return tuple(name for name, default in _options(POLICIES[name]).items() if default is inspect.Parameter.empty)


def _options(function: Callable[..., Policy]) -> dict[str, Any]:
    """Names and defaults of a policy's options; where it hands them on, only the policy that gets them has defaults."""
    options: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            (handed_on,) = get_args(get_type_hints(function)[parameter.name])
            options |= dict.fromkeys(get_type_hints(handed_on))
        else:
            options[parameter.name] = parameter.default
    return options


def _call(name: str, options: dict[str, Any]) -> Policy:
    if name in ANYWHERE and not options:
        return ANYWHERE[name]()
    function = POLICIES[name]
    known = _options(function)
    for option in options:
        if option not in known:
            raise InvalidPolicy(
                f"policy {name!r} has no option {option!r}",
                where="options",
                fix=f"its options are: {', '.join(known) or 'none'}",
            )
    for option in required_options(name):
        if option not in options:
            raise InvalidPolicy(
                f"policy {name!r} needs the option {option!r}",
                where="options",
                why="it follows what was learned for one model and sampler",
                fix=f"get_policy({name!r}, {option}='file')",
            )
    return function(**options)
