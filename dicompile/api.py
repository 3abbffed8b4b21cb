"""`optimize`, `restore` and what can be asked of an optimized model."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dicompile.analysis import ModelStructure
from dicompile.capture import Said, check_names
from dicompile.compiler import CompiledFrame, Options, compile_ahead
from dicompile.errors import AlreadyOptimized, InvalidSchedule, NotOptimized, NotYetRun
from dicompile.learn.recording import Goal, Recording
from dicompile.lower import Backend, Hoist
from dicompile.pipelines import (
    components_named,
    is_denoiser_of,
    optimized_components,
    replace_components,
    restore_components,
)
from dicompile.plan import (
    CacheOptions,
    Plan,
    Policy,
    TimestepSchedule,
    Timing,
    check_components,
    check_one_denoiser,
)
from dicompile.policies import get_policy
from dicompile.runtime import RunReport, SchedulerLink, Session, current_session
from dicompile.runtime import session as open_session
from dicompile.summary import ModelSummary, Summary
from dicompile.wrapper import CachedModel, Record, find_optimized, record_of, released, without_compile

log = logging.getLogger("dicompile")


def optimize(
    model: Any,
    policy: Policy | str | dict[str, Any] = "none",
    *,
    schedule: Any = None,
    backend: str = "inductor",
    options: Mapping[str, Any] | None = None,
    compile_mode: str | None = None,
    warmup: str | None = None,
    dynamic: bool | None = None,
    max_cache_bytes: int | str | None = None,
    over_budget: str = "refuse",
    cache_dtype: str | torch.dtype | None = None,
    cache_device: str | torch.device | None = None,
    timestep: str | None = None,
    latent: str | None = None,
    components: Sequence[str] | None = None,
    hoist: str | None = None,
    attention: str | None = None,
    mode: str | None = None,
    recording: Recording | str | Path | None = None,
    budget: float | None = None,
    speedup: float | None = None,
    max_error: float | None = None,
    timing: Timing | str | Path | None = None,
) -> Any:
    """Compile a diffusion transformer with feature caching.

    Args:
        model: a module, or a diffusers pipeline, whose denoiser is then replaced in place and whose scheduler is
            followed.
        policy: a policy, the name of a published one, plain data, or the path of a YAML or JSON file; or "auto": the
            best plan that follows from `recording` for one goal: `budget`, `speedup` or `max_error`, of all denoisers.
        schedule: for a module: the diffusers scheduler that drives the sampling, or what has it as its ``scheduler``,
            and may have another one later; a list of timesteps, or a number of steps.
        backend: "inductor" compiles; "eager" runs the rewritten graphs operator by operator, for debugging.
        options: of Inductor, as ``torch.compile`` takes them: ``{"max_autotune": True}``.
        compile_mode: what ``torch.compile`` calls its mode: "max-autotune", or "reduce-overhead" for CUDA graphs. Those
            of Inductor are never used, since they overwrite what an earlier step stored: each step is recorded as one
            graph, on slots that never move, when it comes for the second time. They pay where launching kernels takes
            longer than running them. Slots, copies of the inputs and the pool of the graphs stay after a generation,
            for as many guidance contexts as there were at once (`RunReport.graph_bytes`), until `free`. Not for models
            of which anything lies on a CPU, with a budget, or with a cache in host memory.
        warmup: "background" lets other processes compile. Sampling starts when the model is captured; a generation that
            begins before its code is there runs uncached, operator by operator, to its end, and the report says so.
        dynamic: False compiles every size by itself. By default the first size of batch, text or image is compiled by
            itself, and from the second on whatever varied is a symbol. True makes symbols at once: the model is traced
            and captured with other sizes, too; ``torch._dynamo.mark_dynamic`` does so for the dimensions that it marks.
            What cannot be found that way is a symbol when it varies; a log line says what was found.
        max_cache_bytes: budget of what one guidance context remembers between two steps: bytes, or text such as "2GiB".
            A sampler that calls the model for the conditional and the unconditional half in turn has two contexts.
        over_budget: what becomes of a plan that needs more: "refuse" raises at the first call, before anything is
            compiled; "degrade" computes at every step what saves the fewest operations per byte, and says what.
        cache_dtype: stores values in "bfloat16", "float16" or "float8_e4m3fn", where they are wider; the last two with
            a scale for every token.
        cache_device: "cpu" keeps what is remembered in host memory between the steps that use it.
        timestep: argument of the model's forward that is its timestep, where that cannot be told; "none" for a model
            that takes none, whose every call is a step.
        latent: argument that is denoised, where that cannot be told.
        components: of a pipeline: names of those to optimize. By default its denoisers; a ControlNet is optimized only
            if it is named here.
        hoist: what is computed outside of the steps: "conditioning" (projections, keys and values of the text, tables
            of positions: once per generation, the very same bits), "all" (modulation, too, for 16 steps of the schedule
            at once; products of more rows may round in another way), or "off". By default "all"; "off" with
            ``backend="eager"``, a budget, or a cache in host memory. Other weights, text or timesteps are seen at every
            call; edits through ``tensor.data`` on an accelerator count from the next generation on.
        attention: who computes it: "sdpa", whichever kernel torch chooses; "cudnn", that of cuDNN before torch's other
            ones; "flash-attn", the package of this name (FlashAttention-3 on Hopper where ``flash_attn_interface`` is
            installed), for all attention that it can compute; or "flex", torch's ``flex_attention``, for attention with
            a mask, which is then never written out for every query. What these cannot compute stays with torch, and a
            log line says how much and why; where that is all of it, the first call raises.
        mode: an older word for `backend`.
        recording: of "auto": what `calibrate` has recorded, or its file.
        budget: of "auto": operations of the run over those without caching, in (0, 1]; with `timing` its time.
        speedup: of "auto": the inverse of `budget`.
        max_error: of "auto": relative L2 error of the last latent that is expected, unitless, for the least compute.
        timing: what `measure` has timed, or its file: "auto" then weighs plans by time, and every plan predicts its own
            by it, in the place of a roofline.

    Returns:
        The pipeline itself, or a wrapper of the module that is called like it and passes every attribute through. The
        module is not changed; `restore` gives it back.

    Raises:
        UnknownPolicy, InvalidPolicy: the policy does not exist or has an option that does not.
        InvalidSetting: a backend, an option of Inductor, an attention or a cache option that does not exist, is not
            installed, or does not go with another; or a goal of "auto" that is missing, not asked for, or out of reach.
            The first call raises it where steps cannot be recorded as CUDA graphs.
        InvalidRecording: the recording is damaged, or of another model.
        PolicyDoesNotFit: the policy is for several denoisers of a pipeline, and others are to be optimized. Whatever
            else does not fit is refused at the first call.
        InvalidTiming: times are damaged, or of another model; the first call raises it where they are of another shape,
            dtype, device or code.
        InvalidSchedule: a caching policy for a module without a schedule.
        AlreadyOptimized: restore it first. A pipeline that shares a denoiser with an optimized one, and has a scheduler
            of its own, is optimized by itself: each has a wrapper around the same weights.
        UnsupportedModel: neither a module nor a pipeline with a denoiser.
    """
    goal = Goal(recording, budget, speedup, max_error, max_cache_bytes, timing)
    chosen = goal.policy if policy == "auto" else goal.unused(get_policy(policy))
    code = Backend.of(backend if mode is None else mode, options, compile_mode, warmup, dynamic, attention)
    cache = CacheOptions.of(max_cache_bytes, over_budget, cache_dtype, cache_device)
    said, hoisted = Said(timestep, latent), Hoist.of(hoist)

    def asked(own: Policy, source: Any, timing: Timing | None) -> Options:
        link = SchedulerLink(source, own.stints[0] if own.stints else None)
        return Options(own, link, code, cache=cache, said=said, hoist=hoisted, timing=timing)

    optimized = find_optimized(model) if isinstance(model, nn.Module) else None
    if optimized is not None:
        raise AlreadyOptimized(
            f"this {type(record_of(optimized).module).__name__} is optimized already",
            fix="model = dicompile.restore(model) first",
        )
    if isinstance(model, nn.Module):
        check_names(without_compile(model), said)
        check_one_denoiser(chosen)
        goal.check_model(model)
        return CachedModel(model, asked(chosen, _source(schedule, chosen), goal.timing_of("")))

    def wrap(name: str, module: nn.Module) -> CachedModel:
        check_names(without_compile(module), said)
        goal.check_model(module, name)
        return CachedModel(module, asked(chosen.of(name), model, goal.timing_of(name)))

    found = components_named(model, components)
    goal.check_components(list(found))
    check_components(chosen, list(found))
    replace_components(model, found, wrap)
    return model


def restore(model: Any) -> Any:
    """Give back what `optimize` was given: the module itself, or the pipeline with its own denoiser.

    Raises:
        NotOptimized: it was not optimized.
    """
    free(model)
    if isinstance(model, nn.Module):
        return released(cached_in(model)[0])
    restore_components(model)
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
    for cached in cached_in(model):
        record_of(cached).is_enabled = False


def enable(model: Any) -> None:
    """Cache again after `disable`; whatever runs next remembers nothing of before.

    Args:
        model: what `optimize` returned.

    Raises:
        NotOptimized: it was not optimized.
    """
    for cached in cached_in(model):
        record_of(cached).is_enabled = True


def free(model: Any = None) -> None:
    """Release what a generation that was left before its end has stored, and the memory of CUDA graphs.

    A generation that reaches its last step, or fails, releases everything else by itself. Only this session is freed
    (see `dicompile.session`): a generation that runs in another one keeps what it needs. Another session is freed by
    its own ``clear()``, that of a thread or task with its end. The generation that was left can go on; its next step
    computes everything anew.

    Args:
        model: what `optimize` returned; nothing for all models, those of the bare backend among them.

    Raises:
        NotOptimized: it was not optimized.
    """
    session = current_session()
    if model is None:
        session.clear()
        return
    for cached in cached_in(model):
        session.free(record_of(cached).calls.owner)


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
    return open_session(Session(links=[record_of(cached).options.link for cached in cached_in(model)]))


def structure_of(model: Any) -> ModelStructure:
    """Structure of an optimized model as it was called last: its shapes, and the way through its forward.

    Of a pipeline with several denoisers this is that of the first one; ask for ``pipe.transformer_2`` by itself.

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
    frame, record = _frame_of(model), record_of(cached_in(model)[0])
    return frame.programs.plan(_schedule_of(record))


def prepare(model: Any, *, late: bool = True, progress: bool = False) -> None:
    """Compile every step of the schedule ahead, so that no later call has to; run the model once before.

    Everything that was optimized in a pipeline is prepared, for all shapes that it ran with. What has not run yet, such
    as the second denoiser of a run that ended early, cannot be: a log line names it.

    Args:
        model: what `optimize` returned.
        late: also for runs, and contexts of one, that begin at any later step: a guidance partner that joins, image to
            image of another strength. They need next to no code of their own, but are planned: seconds for 50 steps.
        progress: show a bar while other processes compile: as many as ``torch._inductor.config.compile_threads``, one
            for each core.

    Raises:
        NotOptimized, NotYetRun: nothing was captured yet.
    """
    records = [record_of(cached) for cached in cached_in(model)]
    if not any(record.frames for record in records):
        _frame_of(model)  # raises
    runs = []
    for record in records:
        if not record.frames:
            log.warning("%s has not run yet, and is not prepared", type(record.module).__name__)
        schedule = record.options.link.planned if late else _schedule_of(record)
        runs += [(frame.programs, schedule) for frame in record.frames]
    compile_ahead(runs, late=late, progress=progress)


def report(model: Any) -> RunReport:
    """What happened in the last generation of this session, in all denoisers of a pipeline and for all shapes.

    Of what else was optimized in a pipeline ask by itself: ``report(pipe.controlnet)``.

    Raises:
        NotOptimized, NotYetRun: nothing ran yet.
    """
    _frame_of(model)
    session = current_session()
    records = [record_of(one) for one in denoising_in(model).values()]
    states = [session.state_of(record.calls.owner) for record in records]
    last = next((state for state in states if state.report.kinds), states[0])
    whole = copy.deepcopy(last.report)
    for record, state in zip(records, states, strict=True):
        # Fixed timesteps do not tell one run from the next.
        if state is not last and record.options.link.is_live and state.schedule_token is last.schedule_token:
            whole.add(state.report)
    return whole


def summary(model: Any) -> Summary:
    """What the last generation of this session did, step by step, and what could be done about it.

    Print it in a terminal, or let a notebook show it. Per step: how many sites were computed, refreshed, forecast and
    reused, bytes held, seconds spent compiling and running (on the host; a GPU may still be at work). After that: cold
    starts with their reason, and suggestions.

    Args:
        model: what `optimize` returned; of a pipeline every denoiser that ran.

    Raises:
        NotOptimized, NotYetRun: nothing ran yet.
    """
    _frame_of(model)
    session = current_session()
    found = []
    for record in map(record_of, denoising_in(model).values()):
        ran = session.state_of(record.calls.owner).report
        if not (record.frames and ran.kinds):
            continue
        parameters = list(record.module.parameters())
        found.append(
            ModelSummary(
                name=type(record.module).__name__,
                plan=record.frames[-1].programs.plan(_schedule_of(record)),
                report=copy.deepcopy(ran),
                weight_bytes=sum(parameter.nbytes for parameter in parameters),
                on_host=all(parameter.device.type == "cpu" for parameter in parameters),
                records=record.options.backend.records_steps,
                keeps=record.options.settings.store.is_open,
            )
        )
    if not found:
        raise NotYetRun(
            f"{type(record_of(cached_in(model)[0]).module).__name__} has not run in this session",
            why="every thread, task and opened session has a report of its own",
            fix="ask where it was sampled, after a generation",
        )
    return Summary(tuple(found))


def _source(schedule: Any, policy: Policy) -> Any:
    if schedule is not None:
        return schedule
    if policy.rules:
        raise InvalidSchedule(
            f"policy {policy.name!r} needs a schedule",
            where="dicompile.optimize",
            why="a plan says for every step what is computed",
            fix="optimize(model, policy, schedule=scheduler), or schedule=50 for a number of steps",
        )
    return 1


def cached_in(model: Any) -> list[CachedModel]:
    """The optimized module that was given, or those of a pipeline, denoisers first; at least one."""
    if isinstance(model, nn.Module):
        optimized = find_optimized(model)
        cached = [] if optimized is None else [optimized]
    else:
        cached = list(optimized_components(model).values())
    if not cached:
        raise NotOptimized(f"this {type(model).__name__} was not optimized", fix="dicompile.optimize(model, policy)")
    return cached


def denoising_in(model: Any) -> dict[str, CachedModel]:
    """Optimized denoisers by component, the empty name for a module; all that was optimized, where none of them was.

    Raises:
        NotOptimized: nothing was optimized.
    """
    cached = cached_in(model)
    if isinstance(model, nn.Module):
        return {"": cached[0]}
    found = optimized_components(model)
    return {name: one for name, one in found.items() if is_denoiser_of(model, one)} or found


def _schedule_of(record: Record) -> TimestepSchedule:
    """The schedule as it is now, from the step at which this session's run began."""
    state, link = current_session().state_of(record.calls.owner), record.options.link
    began = state.first_step if state.schedule_token is link.token else None
    return link.planned if began is None else link.rest(began)


def _frame_of(model: Any) -> CompiledFrame:
    """What ran last."""
    record = record_of(cached_in(model)[0])
    if not record.frames:
        raise NotYetRun(
            f"{type(record.module).__name__} has not run yet",
            why="structure and plan depend on the shapes of the first call",
            fix="call the model once, or use `dicompile inspect`",
        )
    return record.frames[-1]
