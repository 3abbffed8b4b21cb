"""``torch.compile(model, backend="dicache", options={...})``: the same flow from Dynamo's side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dicompile.capture import input_names
from dicompile.compiler import CompiledFrame, Options, Specialiser
from dicompile.errors import CannotCapture, InvalidSetting, NoSitesFound
from dicompile.lower import check_mode
from dicompile.plan import CacheOptions
from dicompile.policies import get_policy
from dicompile.runtime import SchedulerLink

log = logging.getLogger("dicompile")

CACHE_OPTIONS = ("max_cache_bytes", "over_budget", "cache_dtype", "cache_device")
OPTIONS = ("policy", "steps", "schedule", "mode", *CACHE_OPTIONS)


def dicache(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """Compile a captured graph with feature caching.

    Args:
        graph: what Dynamo captured.
        example_inputs: its inputs.
        options: "policy" (name, `Policy` or plain data; default "none"), "steps" (number of sampling steps) or
            "schedule" (scheduler or timesteps), "mode", and those of the cache: "max_cache_bytes", "over_budget",
            "cache_dtype", "cache_device"; see `dicompile.optimize`.

    Raises:
        InvalidSetting: an option is unknown, or a caching policy comes without steps.
    """
    del example_inputs
    return backend_for(_options_of(options or {}), _say_what_was_found, _say_what_forbids)(graph)


_READ: dict[int, tuple[dict[str, Any], dict[str, Any], Options]] = {}


def _options_of(given: dict[str, Any]) -> Options:
    """One object for all graphs of a model, by which they know each other.

    ``torch.compile`` hands every graph of a model the very dictionary that the user gave; it is kept, so that no other
    one takes its identity.
    """
    known = _READ.get(id(given))
    if known is None or known[1] != given:
        known = _READ[id(given)] = (given, dict(given), read_options(given))
    return known[2]


def read_options(options: dict[str, Any]) -> Options:
    """Check the options of the bare backend."""
    for name in options:
        if name not in OPTIONS:
            raise InvalidSetting(
                f"backend 'dicache' has no option {name!r}",
                where="torch.compile",
                fix=f"its options are: {', '.join(OPTIONS)}",
            )
    policy = get_policy(options.get("policy", "none"))
    source = options.get("schedule", options.get("steps"))
    if source is None:
        if policy.rules:
            raise InvalidSetting(
                f"policy {policy.name!r} needs to know the number of steps",
                where="torch.compile(backend='dicache')",
                why="a plan says for every step what is computed",
                fix="options={'policy': ..., 'steps': 50}",
            )
        source = 1
    mode = options.get("mode", "inductor")
    check_mode(mode)
    cache = CacheOptions.of(
        **{name: options[name] for name in CACHE_OPTIONS if name in options}, where="torch.compile(backend='dicache')"
    )
    return Options(policy, SchedulerLink(source), mode, cache=cache)


def backend_for(
    options: Options,
    on_compiled: Callable[[CompiledFrame], None],
    on_refused: Callable[[CannotCapture], None] | None = None,
) -> Callable[..., Callable[..., Any]]:
    """A Dynamo backend with fixed options.

    Args:
        options: what the user asked for.
        on_compiled: told of everything that was compiled.
        on_refused: told of graphs that cannot be captured and are compiled plainly instead; they are errors without it.
    """

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> Callable[..., Any]:
        del example_inputs
        return Specialiser(graph, input_names(graph.graph), options, on_compiled, on_refused)

    return backend


def _say_what_was_found(frame: CompiledFrame) -> None:
    if not frame.structure.sites:
        log.info("no cacheable branch in this graph: compiled without caching")


def _say_what_forbids(refused: CannotCapture) -> None:
    log.warning("compiled without caching: %s (%s)", refused.what, refused.why)


def require_sites(frame: CompiledFrame, options: Options, model: str) -> None:
    """Raise if a caching policy meets a model without sites.

    Raises:
        NoSitesFound: it does.
    """
    if frame.structure.sites or not options.policy.rules:
        return
    raise NoSitesFound(
        f"{model} has no cacheable branch",
        where=f"analysis, {frame.structure.flops / 1e9:.3f} GFLOP a call",
        why="no residual add with a matrix product in its branch depends on the latent",
        fix="use policy 'none' to compile it without caching",
    )
