"""Private names of torch that dicompile cannot do without, with the versions that they were tried on."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame
from torch._C._dynamo.guards import TensorGuards
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import convert_frame, symbolic_convert
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._functorch._aot_autograd.functional_utils import (
    assert_functional_graph,
    from_fun,
    has_data_mutation,
    has_metadata_mutation,
    to_fun,
)
from torch._library.custom_ops import CustomOpDef
from torch._ops import mode_stack_state_for_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx import _lazy_graph_module
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, make_fx
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from dicompile.nodes import results_of

METHODS_ARE_GUARDED = torch.__version__ >= "2.13"
"""Whether Dynamo has a guard on a bound method that lies in an object; torch 2.11 has none."""
CLASSES_ARE_GUARDED = torch.__version__ >= "2.13"
"""Whether Dynamo has guards on what it reads of a class, and sees what a thread puts in its place; not torch 2.11."""
LOGGING_IS_LEFT_OUT = torch.__version__ >= "2.13"
"""Whether Dynamo can leave out methods of loggers: that of 2.11 then fails to make JSON of its own settings."""
MODES_ARE_TRACED = torch.__version__ >= "2.13"
"""Whether Dynamo traces what a `TorchFunctionMode` around it does; that of 2.11 leaves it out."""
CONTEXT_VARIABLES: tuple[type, ...] = tuple(filter(None, [getattr(torch._dynamo.source, "ContextVarGetSource", None)]))
"""Sources of Dynamo's that are values of context variables; before torch 2.14 it does not look into these."""
UNNAMED_SCOPE = re.compile(r"___unnamed_scope_(\d+)_")
"""What Dynamo of torch 2.14 calls global names that are those of no Python module, with the id of their dictionary."""
_CallableT = TypeVar("_CallableT", bound=Callable[..., Any])


def process_group(name: str) -> torch.distributed.ProcessGroup:
    """The process group that a collective in a graph names (torch 2.11 to 2.14)."""
    groups: Any = torch.distributed.distributed_c10d
    found: torch.distributed.ProcessGroup = groups._resolve_process_group(name)
    return found


def all_gather(
    mine: Tensor, group: torch.distributed.ProcessGroup, *, in_background: bool = False
) -> tuple[Tensor, torch.distributed.Work | None]:
    """Numbers of all ranks in one tensor, [ranks, n], and what to wait for; torch 2.13 named the function anew.

    Args:
        mine: of this rank, [n].
        group: the ranks.
        in_background: the tensor may not be looked at before its work is done.
    """
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    into = mine.new_empty(torch.distributed.get_world_size(group) * len(mine))
    work: torch.distributed.Work | None = getattr(torch.distributed, name)(into, mine, group, async_op=in_background)
    return into.view(-1, len(mine)), work


def mixed_precision(part: nn.Module) -> Any:
    """The ``MixedPrecisionPolicy`` of a module that was given to ``fully_shard`` (torch 2.11 to 2.14)."""
    state: Any = part._get_fsdp_state()  # type: ignore[operator]
    return state._mp_policy


def policy_of_hook(hook: Any) -> Any:
    """The ``MixedPrecisionPolicy`` by which a hook of ``fully_shard`` casts (torch 2.11 to 2.14).

    It is a method of FSDP's state, or a function around one, for several modules whose weights are gathered at once.
    """
    while not hasattr(hook, "__self__"):
        hook = hook.__wrapped__
    return hook.__self__._mp_policy


def local_part(weight: Any) -> Tensor:
    """What a rank has of a DTensor: the very tensor that edits change (``to_local`` returns another one of parameters).

    Torch 2.11 to 2.14.
    """
    part: Tensor = weight._local_tensor
    return part


def hook_of_layer(hook: Any) -> tuple[Any, Any] | None:
    """What a hook of ``distribute_module`` calls, and the mesh; None for any other hook.

    The hook is a lambda, whose variables are looked at (torch 2.13 and 2.14.1). Of others nothing is known,
    and its layer is refused by name.
    """
    if getattr(hook, "__module__", None) != "torch.distributed.tensor._api" or not isinstance(hook, types.FunctionType):
        return None
    cells = (cell.cell_contents for cell in hook.__closure__ or ())
    found = dict(zip(hook.__code__.co_freevars, cells, strict=True))
    return found.get("input_fn", found.get("output_fn")), found.get("device_mesh")


def write_out(operator: CustomOpDef, function: Callable[..., Any]) -> None:
    """Let Inductor see an operator as the calls of which a function consists (torch 2.11 to 2.14)."""

    def written_out(mode: Any, _operator: Any, _types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with mode:
            return function(*args, **kwargs)

    operator.register_torch_dispatch(FunctionalTensorMode, written_out)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit: Callable[..., Tensor],
    read: tuple[Tensor | torch.SymInt, ...],
    scale: float,
    has_lse: bool,
) -> tuple[Tensor, Tensor]:
    """``flex_attention`` as the operator of which Inductor makes one kernel (torch 2.11 to 2.14).

    torch's function of this name would compile it by itself where nobody does.

    Args:
        query: [b, h, n, d].
        key: [b, k, m, d], of as many heads, or of one for several that follow each other.
        value: [b, k, m, e].
        logit: a logit as it counts, given the logit, the numbers of sample, head, query and key, and what it reads.
        read: what it reads: tensors, and symbols that sizes of these are, without which the kernel for a CPU fails.
        scale: factor of the logits.
        has_lse: whether the logsumexp is wanted, which Inductor's kernel for a CPU does not make.

    Returns:
        Output, [b, h, n, e], with its axes in memory in the order of the query's; and the logsumexp of the logits,
        [b, h, n].
    """
    one = torch.ones([1, 1, 1], dtype=torch.int32, device=query.device)
    whole = BlockMask.from_kv_blocks(
        one, torch.zeros_like(one).unsqueeze(0), BLOCK_SIZE=1 << 30, mask_mod=_every_key, seq_lengths=(1, 1),
        compute_q_blocks=False,
    )  # fmt: skip
    options = {
        "BACKEND": "AUTO", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": has_lse, "OUTPUT_MAX": False,
    }  # fmt: skip
    attend = torch.ops.higher_order.flex_attention
    output, lse, *_ = attend(query, key, value, logit, whole.as_tuple(), scale, options, read, ())
    return output, lse * math.log(2)


def any_number_of_queries() -> contextlib.AbstractContextManager[object]:
    """While open, Inductor asks of no ``flex_attention`` whether it has fewer than 128 queries (torch 2.11 to 2.14).

    It has another kernel for so few, and asks although it is told to leave that alone: code for any number of queries
    would be code for as few, or as many, as there are in the example.
    """
    lowering = importlib.import_module("torch._inductor.kernel.flex.flex_attention")
    return mock.patch.object(lowering, "_use_flex_decoding", lambda *_: False)


def _every_key(sample, head, query, key):  # type: ignore[no-untyped-def]  # with types torch 2.13 cannot key its cache
    del head, query, key
    return sample.new_ones((), dtype=torch.bool)


def has_kernel_for_cpu() -> bool:
    """True where Inductor's kernel of ``flex_attention`` for a CPU runs (torch 2.11 to 2.14)."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def tensor_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that is true for tensors of the same types, shapes, strides, dtypes and devices as these.

    It is Dynamo's own comparison, a loop in C++ (torch 2.11 to 2.14): a tenth of a microsecond a tensor, where asking
    for one attribute in Python takes as long. Both keywords have to be given.
    """
    if not tensors:
        return lambda: True
    shapes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    return check


@dataclass(frozen=True)
class DynamoCapture:
    """What Dynamo makes of a function.

    Attributes:
        graph: torch-level graph.
        guards: source, kind, and what else it names (an attribute that is absent, another source), of every guard on an
            object.
        decided: what Dynamo took for granted of sizes and numbers that it had made symbols of, as text.
        aliases: Python modules by the names that Dynamo gives them.
        results: how many tensors the graph returns.
        codes: Python code that was traced, ours among it.
        misses: look-ups of an entry or an attribute that failed meanwhile, on which there is no guard: kind of the
            exception (``KeyError``), and what it says.
        run: calls the function around the graph, with given results of it; returns the inputs of the graph and what the
            function returns.
    """

    graph: fx.GraphModule
    guards: tuple[tuple[Any, str, Any], ...]
    decided: tuple[str, ...]
    aliases: Mapping[str, str]
    results: int
    codes: frozenset[types.CodeType]
    misses: tuple[tuple[type, str], ...]
    run: Callable[[Sequence[Tensor]], tuple[list[Any], Any]]


def dynamo_capture(function: Callable[..., Any], args: tuple[Any, ...]) -> DynamoCapture:
    """Let Dynamo make one graph of a function, without installing anything (``fullgraph_capture``, torch 2.11 to 2.14).

    Raises:
        TorchDynamoException: it cannot.
    """
    misses: list[tuple[type, str]] = []
    with (
        get_metrics_context(),
        dynamo_timed("dicompile"),
        _no_function_names(),
        code_on_demand(),
        _noting_misses(misses),
        _internal_errors(),
    ):
        made = convert_frame.fullgraph_capture(function, args)
    output, backend = made.graph_capture_output, made.backend_input
    if backend is None:
        raise torch._dynamo.exc.Unsupported("it runs without any operator")
    guards = list(map(_facts, output.output_graph.guards))

    def run(results: Sequence[Tensor]) -> tuple[list[Any], Any]:
        inputs: list[Any] = []

        def compiled(*given: Any) -> Sequence[Tensor]:
            inputs.extend(given)
            return results

        around = types.FunctionType(
            output.bytecode, {**output.f_globals, backend.backend_id: compiled}, "run", output.argdefs, output.closure
        )
        return inputs, around(*args)

    returned = results_of(backend.graph_module.graph)
    decided = tuple(str(guard.expr) for guard in output.output_graph.shape_env.guards)
    return DynamoCapture(
        graph=backend.graph_module,
        guards=tuple(guards),
        decided=decided,
        aliases=dict(output.import_sources),
        results=len(returned),
        codes=frozenset(output.traced_code),
        misses=tuple(misses),
        run=run,
    )


@contextlib.contextmanager
def _internal_errors() -> Iterator[None]:
    """What Dynamo stumbles over by itself is something that it cannot take, as ``torch.compile`` has it."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException:
        raise
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("torch._dynamo."):
            raise
        raise torch._dynamo.exc.InternalTorchDynamoError(f"{type(error).__name__}: {error}") from error


def functional_trace(graph_module: fx.GraphModule, inputs: Sequence[object]) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Trace a graph once more, by ATen operators that write to no tensor (torch 2.11 to 2.14).

    It is the second half of ``aot_export_module(..., pre_dispatch=True)``, in half of its time: the first half runs the
    graph to find out about gradients, and about writes, which the trace finds, too.

    Args:
        graph_module: torch-level or ATen graph, which returns a tuple.
        inputs: one value per placeholder; tensors are fake ones of the mode that is active.

    Returns:
        The graph, with the placeholders and results of the other one, and positions of inputs to which that one writes.

    Raises:
        RuntimeError, AssertionError: torch cannot make it functional.
    """
    mutated: list[int] = []

    def functionalised(*given: object) -> tuple[object, ...]:
        wrapped = [to_fun(value) if isinstance(value, Tensor) else value for value in given]
        results = PropagateUnbackedSymInts(graph_module).run(*wrapped)
        for i, (value, before) in enumerate(zip(wrapped, given, strict=True)):
            if isinstance(value, Tensor) and (
                has_data_mutation(value) or has_metadata_mutation(value, before, check_only_storage_mutation=False)
            ):
                mutated.append(i)
        return tuple(from_fun(value) if isinstance(value, Tensor) else value for value in results)

    mode = FunctionalTensorMode(pre_dispatch=True, export=True)
    with enable_python_dispatcher(), mode, fx.traceback.preserve_node_meta():
        made = make_fx(functionalised, pre_dispatch=True, record_module_stack=True)(*inputs)
    assert_functional_graph(made.graph)
    made.graph.eliminate_dead_code()
    return made, tuple(mutated)


@contextlib.contextmanager
def _noting_misses(noted: list[tuple[type, str]]) -> Iterator[None]:
    """While open, exceptions that what Dynamo traces raises, or catches, are noted (torch 2.11 to 2.14)."""
    exc = torch._dynamo.exc
    original = exc.ObservedException.__init__

    def note(self: Any, *said: Any, **kept: Any) -> None:
        original(self, *said, **kept)
        kinds = [kind for kind, observed in exc.observed_exception_map.items() if observed is type(self)]
        noted.extend((kind, " ".join(str(getattr(item, "value", item)) for item in said)) for kind in kinds)

    with mock.patch.object(exc.ObservedException, "__init__", note):
        yield


@contextlib.contextmanager
def _no_function_names() -> Iterator[None]:
    """Dynamo tokenizes every file of which it traces a line, to name functions in a log line that nobody reads."""
    is_read = symbolic_convert.trace_call_log.isEnabledFor(logging.DEBUG)
    with contextlib.nullcontext() if is_read else mock.patch.object(symbolic_convert, "get_funcname", lambda *_: None):
        yield


def noting_writes(noted: list[tuple[Any, Any]]) -> Callable[[Any], None]:
    """What to hand to `comptime` in a function that Dynamo traces (torch 2.11 to 2.14).

    Args:
        noted: gets the objects that were there before and that the trace wrote to, up to there, with their sources.
    """
    new = (AttributeMutationNew, ValueMutationNew)

    def note(context: Any) -> None:
        effects = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
        objects = {id(item): item for item in effects.keepalive}
        noted.extend(
            (variable.source, objects[key])
            for key, variable in effects.id_to_variable.items()
            if effects.is_modified(variable) and not isinstance(variable.mutation_type, new)
        )

    return note


def tracer_settings() -> tuple[tuple[str, str], ...]:
    """Flags and numbers that decide how Dynamo and AOTAutograd trace; ``get_hash`` is another one in every process."""
    settings = {
        f"{config.__name__}.{name}": repr(value)
        for config in (torch._dynamo.config, torch._functorch.config)
        for name, value in config.get_config_copy().items()
        if isinstance(value, (bool, int, float, str))
    }
    return tuple(sorted(settings.items()))


def forget_tensors(graph: fx.Graph) -> None:
    """Let fake modes of a graph's values forget of which tensors they have made fake ones.

    They refer to these weakly, and torch exchanges no tensor that is referred to so: ``.to()`` of a quantised weight.
    """
    values = (node.meta.get("val", node.meta.get("example_value")) for node in graph.nodes)
    for mode in {value.fake_mode for value in values if isinstance(value, FakeTensor)}:
        mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def left_alone(function: _CallableT) -> _CallableT:
    """Let Dynamo put calls of a function into its graph as they are, for as long as the function lives."""
    torch.compiler.allow_in_graph(function)
    return function


def code_on_demand() -> contextlib.AbstractContextManager[None]:
    """While open, graph modules that torch makes write their Python code when it runs, if ever (torch 2.11 to 2.14)."""
    return _lazy_graph_module._use_lazy_graph_module(True)


def lazy_graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that writes its Python code when it runs, if ever: for a deep model that takes a second each."""
    return _lazy_graph_module._LazyGraphModule(root, graph)


def function_of(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """The Python function of a graph, which is written now if it was not yet."""
    _lazy_graph_module._LazyGraphModule.force_recompile(graph_module)
    function: Callable[..., Any] = graph_module.forward
    return function


def _facts(guard: Any) -> tuple[Any, str, Any]:
    """Source, kind, and what else a guard names (see `DynamoCapture`)."""
    source, kind, named = guard.originating_source, guard.inner_create_fn().__name__, None
    if isinstance(guard.create_fn, functools.partial):
        named = next(iter((*guard.create_fn.args, *guard.create_fn.keywords.values())), None)
    if kind == "HASATTR" and named is None:  # torch 2.11: the attribute is part of the source
        return source.base, kind, source.member
    return source, kind, named


def transform_around() -> str | None:
    """Who traces or transforms what this thread runs, by name, if anybody does (torch 2.11 to 2.14)."""
    interpreter: Any = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None:
        return f"torch.func ({interpreter.key().name.lower()})"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    tracers = (ProxyTorchDispatchMode, FakeTensorMode)
    modes = dispatch_modes()
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch):  # else it is another thread's
        modes.append(mode_stack_state_for_pre_dispatch().get(0))
    return next((type(m).__name__ for m in modes if isinstance(m, tracers)), None)


def dispatch_modes() -> list[TorchDispatchMode]:
    """Modes of this thread that see every operator."""
    return _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []


@contextlib.contextmanager
def transforms_undone() -> Iterator[None]:
    """Afterwards as many functorch transforms are open as before: an error in one that is traced leaves it open."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def never_traced(why: str) -> Callable[[_CallableT], _CallableT]:
    """Decorator of a function that Dynamo neither traces nor inlines: another compile around it calls it as it is.

    `torch.compiler.disable` would do, for the price of a context manager at every call.
    """

    def mark(function: _CallableT) -> _CallableT:
        skip_code(function.__code__)
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = why  # type: ignore[attr-defined]
        function._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
        return function

    return mark


@contextlib.contextmanager
def _switched_off() -> Iterator[None]:
    prior = set_eval_frame(None)
    try:
        yield
    finally:
        set_eval_frame(prior)


def without_dynamo() -> contextlib.AbstractContextManager[None]:
    """While open, Dynamo compiles nothing in this thread; costs nothing where it would not anyway."""
    return _NOTHING if get_eval_frame_callback() is None else _switched_off()


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def meta_errors_unsaid() -> Iterator[None]:
    """While open, torch does not log which operators fake tensors do not fit (torch 2.11 to 2.14)."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
