"""`optimize`, `restore` and what can be asked of an optimized model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from dicompile.analysis import ModelStructure
from dicompile.backend import backend_for, require_sites
from dicompile.compiler import ONE_AT_A_TIME, CompiledFrame, Options
from dicompile.errors import (
    AlreadyOptimized,
    CannotCapture,
    InvalidSchedule,
    NotOptimized,
    NotYetRun,
    UnsupportedModel,
)
from dicompile.lower import check_mode
from dicompile.offload import HOOK_ATTRIBUTES, check_weights_are_whole, move_hook
from dicompile.plan import CacheOptions, Plan, Policy
from dicompile.policies import get_policy
from dicompile.runtime import RunReport, SchedulerLink, Session, cache_context, current_session
from dicompile.runtime import session as open_session
from dicompile.traced import TracedModel

log = logging.getLogger("dicompile")

# Dynamo compiles a forward 8 times, for all instances of its class together, and then runs it as it is without a word.
# torch 2.13 can count per instance; every shape of the inputs is one compilation.
_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch._dynamo.eval_frame._optimize).parameters
_OWN_LIMIT: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": 128} if _CAN_ISOLATE else {}
TIMESTEP_ARGUMENTS = ("timestep", "timesteps", "t", "sigma", "sigmas")


def optimize(
    model: Any,
    policy: Policy | str | dict[str, Any] = "none",
    *,
    schedule: Any = None,
    mode: str = "inductor",
    max_cache_bytes: int | str | None = None,
    over_budget: str = "refuse",
    cache_dtype: str | torch.dtype | None = None,
    cache_device: str | torch.device | None = None,
) -> Any:
    """Compile a diffusion transformer with feature caching.

    Args:
        model: a module, or a diffusers pipeline, whose denoiser is then replaced in place and whose scheduler is
            followed.
        policy: a policy, the name of a published one, plain data, or the path of a YAML or JSON file.
        schedule: for a module: the diffusers scheduler that drives the sampling, a list of timesteps, or a number of
            steps.
        mode: "inductor" compiles; "eager" runs the rewritten graphs operator by operator, for debugging.
        max_cache_bytes: budget of what one guidance context remembers between two steps: bytes, or text such as "2GiB".
            A sampler that calls the model for the conditional and the unconditional half in turn has two contexts.
        over_budget: what becomes of a plan that needs more: "refuse" raises at the first call, before anything is
            compiled; "degrade" computes at every step what saves the fewest operations per byte, and says what.
        cache_dtype: stores values in "bfloat16", "float16" or "float8_e4m3fn", where they are wider; the last two with
            a scale for every token.
        cache_device: "cpu" keeps what is remembered in host memory between the steps that use it.

    Returns:
        The pipeline itself, or a wrapper of the module that is called like it and passes every attribute through. The
        module is not changed; `restore` gives it back.

    Raises:
        UnknownPolicy, InvalidPolicy: the policy does not exist or has an option that does not.
        InvalidSetting: a mode or a cache option that does not exist.
        InvalidSchedule: a caching policy for a module without a schedule.
        AlreadyOptimized: restore it first.
        UnsupportedModel: neither a module nor a pipeline with a denoiser.
    """
    chosen = get_policy(policy)
    check_mode(mode)
    cache = CacheOptions.of(max_cache_bytes, over_budget, cache_dtype, cache_device)
    if isinstance(model, CachedModel):
        raise AlreadyOptimized(
            f"this {type(model.original).__name__} is optimized already", fix="model = dicompile.restore(model) first"
        )
    if isinstance(model, nn.Module):
        return CachedModel(model, Options(chosen, _link(schedule, chosen), mode, cache=cache))
    for name, denoiser in _denoisers(model).items():
        if isinstance(denoiser, CachedModel):
            raise AlreadyOptimized(f"the pipeline's {name} is optimized already", fix="dicompile.restore(pipe) first")
        setattr(model, name, CachedModel(denoiser, Options(chosen, SchedulerLink(model), mode, cache=cache)))
    return model


def restore(model: Any) -> Any:
    """Give back what `optimize` was given: the module itself, or the pipeline with its own denoiser.

    Raises:
        NotOptimized: it was not optimized.
    """
    free(model)
    if isinstance(model, CachedModel):
        return model.released()
    for name, denoiser in _denoisers(model).items():
        if isinstance(denoiser, CachedModel):
            setattr(model, name, denoiser.released())
    return model


def disable(model: Any) -> None:
    """Run the original module until `enable`; what was compiled is kept, and what this session remembers released.

    For another policy, restore it and optimize it anew.

    Args:
        model: what `optimize` returned.

    Raises:
        NotOptimized: it was not optimized.
    """
    free(model)
    for cached in _cached_in(model):
        cached.is_enabled = False


def enable(model: Any) -> None:
    """Cache again after `disable`; whatever runs next remembers nothing of before.

    Args:
        model: what `optimize` returned.

    Raises:
        NotOptimized: it was not optimized.
    """
    for cached in _cached_in(model):
        cached.is_enabled = True


def free(model: Any = None) -> None:
    """Release what a generation that was left before its end has stored.

    A generation that reaches its last step, or fails, releases everything by itself. Only this session is freed (see
    `dicompile.session`): a generation that runs in another one keeps what it needs. Another session is freed by its own
    ``clear()``, that of a thread or task with its end. The generation that was left can go on; its next step computes
    everything anew.

    Args:
        model: what `optimize` returned; nothing for all models, those of the bare backend among them.

    Raises:
        NotOptimized: it was not optimized.
    """
    session = current_session()
    if model is None:
        session.clear()
        return
    for cached in _cached_in(model):
        for frame in cached.frames:
            session.state_of(frame.run).free()


def session(model: Any = None) -> contextlib.AbstractContextManager[Session]:
    """Run what follows in a session of its own, for generations that take turns in one thread.

    Args:
        model: what `optimize` returned, of which alone the session then remembers anything; nothing for all models; or
            a session that was opened before, to go on with it.

    Raises:
        NotOptimized: the model was not optimized.
    """
    if model is None or isinstance(model, Session):
        return open_session(model)
    return open_session(Session(links=[cached.link for cached in _cached_in(model)]))


def structure_of(model: Any) -> ModelStructure:
    """Structure of an optimized model for the shapes that ran last.

    Raises:
        NotOptimized, NotYetRun: nothing was captured yet.
    """
    return _frame_of(model).structure


def plan_of(model: Any) -> Plan:
    """Plan of an optimized model for its schedule as it is now, from the step at which this session's run began.

    Of a pipeline with several denoisers this is the plan of the first one; ask for ``pipe.transformer_2`` by itself.

    Raises:
        NotOptimized, NotYetRun: nothing was captured yet.
    """
    frame = _frame_of(model)
    return frame.programs.plan(frame.run.schedule_of(current_session().state_of(frame.run)))


def prepare(model: Any) -> None:
    """Compile every step of the schedule ahead, so that no later call has to; call the model once before.

    Raises:
        NotOptimized, NotYetRun: nothing was captured yet.
    """
    frame = _frame_of(model)
    schedule = frame.run.link.schedule
    for step in range(schedule.steps):
        frame.programs.step(schedule, step)


def report(model: Any) -> RunReport:
    """What happened in the last generation of this session, in all denoisers of a pipeline and for all shapes.

    Raises:
        NotOptimized, NotYetRun: nothing ran yet.
    """
    session, latest = current_session(), _frame_of(model)
    last = session.state_of(latest.run)
    whole = copy.deepcopy(last.report)
    for cached in _cached_in(model):
        for frame in cached.frames:
            state = session.state_of(frame.run)
            # Fixed timesteps do not tell one run from the next.
            if state is not last and latest.run.link.is_live and state.schedule_token is last.schedule_token:
                whole.add(state.report)
    return whole


class CachedModel(OptimizedModule):
    """An optimized module: called like the original, with every attribute of the original where it was.

    It is a ``torch._dynamo.OptimizedModule``, which diffusers, accelerate and peft know how to unwrap.
    """

    _options: Options | None = None
    _frames: list[CompiledFrame] | None = None
    _by_dynamo: Callable[..., Any] | None = None
    _traced: TracedModel | None = None
    is_enabled: bool = True

    def __init__(self, module: nn.Module, options: Options) -> None:
        check_weights_are_whole(module)
        backend = backend_for(options, self._remember)
        # Any: Dynamo may be switched off
        context: Any = torch._dynamo.optimize(backend, nopython=True, dynamic=False, **_OWN_LIMIT)
        super().__init__(module, context)
        self._options, self._frames = options, []
        self._by_dynamo, self.forward = self.forward, self._call
        move_hook(module, self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is optimized alike, and has captured nothing yet."""
        return type(self), (self.original, self._options), {"is_enabled": self.is_enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.is_enabled = state["is_enabled"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in HOOK_ATTRIBUTES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in HOOK_ATTRIBUTES:
            object.__delattr__(self, name)
        else:
            super().__delattr__(name)

    def released(self) -> nn.Module:
        """The module that was optimized, with the hooks that it got meanwhile."""
        move_hook(self, self.original)
        return self.original

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """That of the original: pipelines ask whether a component is a model of theirs."""
        return type(self._modules["_orig_mod"]) if "_modules" in vars(self) else type(self)

    @property
    def original(self) -> nn.Module:
        """The module that was optimized."""
        module: nn.Module = self._orig_mod
        return module

    @property
    def link(self) -> SchedulerLink:
        """Where the schedule comes from."""
        assert self._options is not None
        return self._options.link

    @property
    def frames(self) -> list[CompiledFrame]:
        """Everything compiled so far, the latest last."""
        return self._frames or []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; it samples, so no gradients are recorded while it is enabled."""
        if not self.is_enabled:
            return super().__call__(*args, **kwargs)
        with ONE_AT_A_TIME, torch.no_grad():
            return super().__call__(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_enabled:
            return self.original(*args, **kwargs)
        if self._traced is None:
            assert self._by_dynamo is not None
            try:
                return self._by_dynamo(*args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, CannotCapture) as refused:
                log.info(
                    "Dynamo cannot take %s whole, so it is run to capture it: %s",
                    type(self.original).__name__, str(refused).splitlines()[0],
                )  # fmt: skip
            check_weights_are_whole(self.original)
            assert self._options is not None
            self._traced = TracedModel(self.original, self._options, self._remember)
        return self._traced(*args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Guidance context, as diffusers pipelines open it on their denoiser."""
        with cache_context(name):
            yield

    def _remember(self, frame: CompiledFrame) -> None:
        assert self._options is not None
        require_sites(frame, self._options, type(self.original).__name__)
        assert self._frames is not None
        self._frames.append(frame)


def _link(schedule: Any, policy: Policy) -> SchedulerLink:
    if schedule is not None:
        return SchedulerLink(schedule)
    if policy.rules:
        raise InvalidSchedule(
            f"policy {policy.name!r} needs a schedule",
            where="dicompile.optimize",
            why="a plan says for every step what is computed",
            fix="optimize(model, policy, schedule=scheduler), or schedule=50 for a number of steps",
        )
    return SchedulerLink(1)


def _denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Components of a pipeline that take a timestep."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict) or getattr(pipeline, "scheduler", None) is None:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} is neither a torch.nn.Module nor a pipeline with a scheduler",
            where="dicompile",
            fix="give the denoiser and its scheduler: optimize(model, policy, schedule=scheduler)",
        )
    found = {
        name: component
        for name, component in components.items()
        if isinstance(component, nn.Module) and _takes_timestep(component)
    }
    if not found:
        raise UnsupportedModel(
            f"{type(pipeline).__name__} has no denoiser",
            where="dicompile",
            why=f"no component's forward takes one of {', '.join(TIMESTEP_ARGUMENTS)}",
            fix="give the denoiser itself: optimize(model, policy, schedule=scheduler)",
        )
    return found


def _takes_timestep(module: nn.Module) -> bool:
    original = module.original if isinstance(module, CachedModel) else module
    return any(name in inspect.signature(original.forward).parameters for name in TIMESTEP_ARGUMENTS)


def _cached_in(model: Any) -> list[CachedModel]:
    """The optimized module that was given, or those of a pipeline; at least one."""
    found = [model] if isinstance(model, nn.Module) else _denoisers(model).values()
    cached = [module for module in found if isinstance(module, CachedModel)]
    if not cached:
        raise NotOptimized(f"this {type(model).__name__} was not optimized", fix="dicompile.optimize(model, policy)")
    return cached


def _frame_of(model: Any) -> CompiledFrame:
    cached = _cached_in(model)[0]
    if not cached.frames:
        raise NotYetRun(
            f"{type(cached.original).__name__} has not run yet",
            why="structure and plan depend on the shapes of the first call",
            fix="call the model once, or use `dicompile inspect`",
        )
    session = current_session()

    def size_then_age(frame: CompiledFrame) -> tuple[int, int]:
        return len(frame.structure.sites), session.state_of(frame.run).generation

    return max(reversed(cached.frames), key=size_then_age)
