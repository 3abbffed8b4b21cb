"""What steps launch and move on an H200, counted on a machine without a GPU: nothing runs, and no weight is needed.

Inductor generates Triton from fake CUDA tensors once torch believes in a device. The belief changes torch for the whole
process, so this is for processes that do nothing else: ``dicompile inspect MODEL --kernels``, and some of the tests'.
It knows internals of torch 2.13.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch.utils import _triton

from dicompile.analysis import analyse
from dicompile.capture import Capture
from dicompile.config import DebugFolder, Settings
from dicompile.lower import Backend, Hoist, Pieces, Program, ProgramBuilder, VariantCache, compile_segment
from dicompile.passes import ReuseClock, Segment, TokenCount, outline
from dicompile.plan import Plan

aten = torch.ops.aten

CUDA = torch.device("cuda", 0)
TARGET = ("cuda", 90, 32)
TFLOPS, DRAM_GB_PER_S, SHARED_MEMORY = 989.0, 4800.0, 232_448
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=139 << 30,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=SHARED_MEMORY, L2_cache_size=60 << 20,
    gcnArchName="", uuid="none",
)  # fmt: skip


@dataclass
class Lowered:
    """What one variant became.

    Attributes:
        calls: launches of Triton kernels ("triton"), and calls of library operators by kind or name.
        copies: launches of Triton kernels that only copy or cast a tensor as large as the residual stream, or larger.
        maps: tensors with a number for every pair of tokens.
        bytes: bytes that everything reads and writes; symbolic sizes count as in the example that they were traced for.
        least: the fewest of them, if products and attention stay calls of a library: see `least_bytes`.
        ints: symbolic ints among the arguments, with the number of launches and calls that use each.
    """

    calls: dict[str, int]
    copies: int
    maps: int
    bytes: int
    least: int
    ints: dict[str, int]


class PretendedDriver:
    """What Triton asks of its driver while it compiles."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}
    )

    def get_current_target(self) -> Any:
        """The architecture."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGET)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default one."""
        del device
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return CUDA


def always(value: object) -> Any:
    """A function that returns a value whatever it is given."""
    return lambda *_, **__: value


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Let Inductor and Triton compile for an H200 that is not there; nothing may run."""
    import triton

    for_device, attention = joint_graph.lazy_init, aten.scaled_dot_product_attention.default
    caches = (_triton.has_triton.cache_clear, attention._dispatch_cache.clear)
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, **stubs: Any) -> None:
            for name, stub in stubs.items():
                stack.enter_context(patch.object(owner, name, stub, create=True))

        for clear in caches:
            stack.callback(clear)
        for interface in (CudaInterface, CudaInterface.Worker):
            replace(interface, get_device_properties=always(PROPERTIES), current_device=always(0))
        replace(
            CudaInterface, is_available=always(True), device_count=always(1), get_compute_capability=always(90),
            is_triton_capable=always(True), raise_if_triton_unavailable=always(None), is_bf16_supported=always(True),
            synchronize=always(None),
        )  # fmt: skip
        replace(
            torch.cuda, is_available=always(True), device_count=always(1), current_device=always(0),
            get_device_properties=always(PROPERTIES), get_device_name=always(PROPERTIES.name),
            get_device_capability=always((9, 0)), get_rng_state=always(torch.zeros(16, dtype=torch.uint8)),
            set_rng_state=always(None), _exchange_device=always(0), _maybe_exchange_device=always(0),
        )  # fmt: skip
        replace(torch._C, _cuda_getCurrentRawStream=always(0))
        replace(Tensor, __invert__=_inverted)
        replace(importlib.import_module("torch._higher_order_ops.flex_attention"), _permute_strides=_permuted)
        replace(torch._subclasses.fake_tensor, init_gpu_context=always(None))
        # Padding a GEMM is decided by a benchmark, unless it is bound by memory.
        replace(torch._inductor.utils, get_device_tflops=always(TFLOPS), get_gpu_dram_gbps=always(DRAM_GB_PER_S))
        # Patterns are traced on real scalars; the device is not part of them.
        replace(joint_graph, lazy_init=lambda *_: for_device(torch.device("cpu")))
        # standalone_compile runs every kernel to choose its configuration.
        replace(PythonWrapperCodegen, generate_and_run_autotune_block=always(None))
        replace(triton_helpers, set_driver_to_gpu=always(None))
        replace(triton.runtime.driver, _active=PretendedDriver())
        stack.enter_context(
            inductor_config.patch(compile_threads=1, force_disable_caches=True, use_static_triton_launcher=False)
        )
        # Folding constants computes them on the device.
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        library.impl("full", _full_on_cpu, "CUDA")
        library.impl("scalar_tensor", _scalar_on_cpu, "CUDA")
        stack.enter_context(patch.dict(attention.py_kernels, {DispatchKey.CompositeImplicitAutograd: _attention}))
        for clear in caches:
            clear()
        yield


def _full_on_cpu(size: list[int], value: float, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.full(size, value, dtype=dtype)


def _inverted(value: Tensor) -> Tensor:
    """``~value``; torch's own asks for a guard of the device."""
    inverted: Tensor = aten.bitwise_not.default(value)
    return inverted


def _permuted(output: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor like `output` with its axes ordered by strides; torch's own copies it, and asks for a guard."""
    order = sorted(range(output.ndim), key=lambda axis: -strides[axis])
    return torch.empty_permuted(output.shape, order, dtype=output.dtype, device=output.device)


def _scalar_on_cpu(value: float, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.scalar_tensor(value, dtype=dtype)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """One fused call, as a CUDA build chooses; a CPU build knows none for CUDA and would write the products out."""
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    if mask is not None:
        bias = mask.expand(*query.shape[:-1], key.shape[-2]).to(query.dtype)
        attend = aten._scaled_dot_product_efficient_attention.default
        attended: Tensor = attend(query, key, value, bias, False, dropout, causal, scale=scale)[0]
        return attended
    flash: Tensor = aten._scaled_dot_product_flash_attention.default(query, key, value, dropout, causal, scale=scale)[0]
    return flash


def move_to_cuda(capture: Capture) -> None:
    """Make every value of the graph anew on the device.

    A CPU build cannot capture on fake CUDA tensors: indexing one from Python asks for a device guard.
    """
    with capture.fake_mode, torch.no_grad(), enable_python_dispatcher():
        for node in capture.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["val"]
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
            elif node.op == "call_function":
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": CUDA}
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda parent: parent.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


class Lowering:
    """Lowers variants one by one and keeps every Triton kernel once, whatever its number in its variant.

    Args:
        stream: number of elements from which on a copy is one of a full-size tensor.
        tokens: number of tokens, where maps of pairs of them are looked for.
    """

    def __init__(self, stream: int, tokens: int = 0) -> None:
        self.stream, self.tokens = stream, tokens
        self.kernels: dict[str, tuple[str, str]] = {}
        self._code, self._bytes, self._least = "", 0, 0
        self._copies: set[str] = set()

    def lower(self, segment: Segment) -> Lowered:
        """Lower one variant."""
        self._code, self._bytes, self._least, self._copies = "def call(): pass", 0, 0, set()
        with (
            patch.object(GraphLowering, "save_output_code", self._keep_code),
            patch.object(AsyncCompile, "triton", self._keep_kernel),
        ):
            compile_segment(segment, Backend())
        functions = [node for node in ast.walk(ast.parse(self._code)) if isinstance(node, ast.FunctionDef)]
        body = next(function for function in functions if function.name == "call")
        calls = [node for node in ast.walk(body) if isinstance(node, ast.Call) and kind_of(node)]
        return Lowered(
            calls=dict(Counter(kind_of(call) for call in calls)),
            copies=sum(self._is_copy(call) for call in calls),
            maps=len(re.findall(rf"empty_strided_cuda\(\([^()]*\b{self.tokens}, {self.tokens}\)", self._code)),
            bytes=self._bytes,
            least=self._least,
            ints={
                str(reference): len(uses_of(f"arg{position}_1", body, calls))
                for position, reference in enumerate(segment.inputs)
                if isinstance(reference, (TokenCount, ReuseClock))
            },
        )

    def _keep_code(self, code: str) -> None:
        self._code = code
        self._bytes = sum(node.get_read_write_buffers_sizes() for node in V.graph.scheduler.nodes)
        self._least = least_bytes(V.graph)

    def _keep_kernel(self, name: str, source: str, device_str: str = "cuda") -> None:
        assert device_str == "cuda"
        self.kernels.setdefault(source.replace(name, "kernel"), (name, source))
        if only_copies(source):
            self._copies.add(name)

    def _is_copy(self, call: ast.Call) -> bool:
        constants = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        sizes = [value for value in constants if isinstance(value, int)]
        return ast.unparse(call.func).removesuffix(".run") in self._copies and prod(sizes) >= self.stream


def least_bytes(graph: GraphLowering) -> int:
    """The fewest bytes that a lowered graph could move with its library calls as they are.

    Kernels around them have to read every input of the graph and every result of a library call that they need once,
    and to write every output and every operand of a library call once; they could keep all else in registers.
    """
    calls = [node for node in graph.scheduler.nodes if node.is_extern()]
    kernels = [node for node in graph.scheduler.nodes if not node.is_extern()]
    operands, results = (_touched(calls, **{kind: True}) for kind in ("reads", "writes"))
    read, written = _touched(kernels, reads=True), _touched(kernels, writes=True)
    needed = {*graph.graph_inputs, *results}
    wanted = {*graph.get_output_names(), *operands}
    return (
        sum(node.get_read_write_buffers_sizes() for node in calls)
        + sum(size for name, size in read.items() if name in needed)
        + sum(size for name, size in written.items() if name in wanted)
    )


def _touched(nodes: Iterable[Any], *, reads: bool = False, writes: bool = False) -> dict[str, int]:
    """Bytes of every buffer that the node that touches most of it touches."""
    found: dict[str, int] = {}
    for node in nodes:
        for name, size in node.get_read_write_buffer_accesses(include_reads=reads, include_writes=writes).items():
            found[name] = max(size, found.get(name, 0))
    return found


def only_copies(source: str) -> bool:
    """True if a Triton kernel stores what it loaded, at most in another order or type."""
    values = re.findall(r"^ +(tmp\d+ = .*)", source, re.MULTILINE)
    casts = [value for value in values if re.fullmatch(r"tmp\d+ = \(?tmp\d+\)?\.to\(tl\.\w+\)", value)]
    return source.count("tl.load(") == source.count("tl.store(") == 1 and len(values) == 1 + len(casts)


def kind_of(node: ast.Call) -> str:
    """What a call in generated code does.

    Returns:
        "triton", "gemm", "attention", the name of another operator, or of a kernel written by hand; "" for nothing.
    """
    path = ast.unparse(node.func)
    if path.endswith(".run"):
        return "triton" if path.startswith("triton_") else re.sub(r"_\d+\.run$", "", path)
    name = re.match(r"(?:extern_kernels|torch\.ops\.\w+|aten)\.(\w+)", path)
    if name is None:
        return ""
    if name[1] in ("mm", "addmm", "bmm", "baddbmm"):
        return "gemm"
    return "attention" if name[1].startswith("_scaled_dot_product") else name[1]


def uses_of(argument: str, body: ast.FunctionDef, calls: Iterable[ast.Call]) -> list[ast.Call]:
    """Calls that read an int argument of the generated code, directly or through arithmetic on it."""
    names = {argument}
    for node in body.body + [inner for block in body.body if isinstance(block, ast.With) for inner in block.body]:
        if isinstance(node, ast.Assign) and not any(isinstance(part, ast.Call) for part in ast.walk(node.value)):
            names |= {ast.unparse(target) for target in node.targets if names & _names(node.value)}
    return [call for call in calls if names & _names(call)]


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


BY_HAND = ("received", "entropy", "log_sum_exp", "selection")
"""Kernels of `dicompile.runtime.kernels`."""


@dataclass(frozen=True)
class Row:
    """One kind of step.

    Attributes:
        policy: its name; "torch.compile" for the uncached model.
        hoist: what is computed outside of the steps.
        step: kind of step.
        triton: launches of kernels in Triton, generated or by hand.
        library: products, convolutions and other operators of libraries.
        attention: calls of fused attention.
        copies: launches, among those of Triton, that only copy or cast a tensor of the stream's size or more.
        bytes: bytes that everything reads and writes.
        least: the fewest of them, see `least_bytes`.
    """

    policy: str
    hoist: str
    step: str
    triton: int
    library: int
    attention: int
    copies: int
    bytes: int
    least: int

    @classmethod
    def of(cls, policy: str, hoist: str, step: str, calls: list[Lowered]) -> Row:
        """The row of a step that makes these calls."""
        kinds = sum((Counter(call.calls) for call in calls), Counter())
        triton = sum(kinds.pop(name, 0) for name in ("triton", *BY_HAND))
        attention = kinds.pop("attention", 0)
        copies, moved, least = (sum(getattr(call, name) for call in calls) for name in ("copies", "bytes", "least"))
        return cls(policy, hoist, step, triton, kinds.total(), attention, copies, moved, least)


class Steps:
    """Steps of one captured model; whatever they share is lowered once.

    Args:
        capture: the model, whose values are on the pretended device.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture, self.structure = capture, analyse(capture)
        self._stream = min(torch.Size(site.shape).numel() for site in self.structure.sites)
        self._lowered: dict[int, tuple[Segment, Lowered]] = {}

    def rows(self, plan: Plan, policy: str, hoist: Hoist) -> Iterator[Row]:
        """One row for the first step of every kind.

        Args:
            plan: of the model.
            policy: what its rows call it.
            hoist: what is computed outside of the steps.
        """
        cache = VariantCache(Backend("eager"), Settings(), DebugFolder(None))
        builder = ProgramBuilder(Pieces(self.capture, self.structure, hoist), cache)
        builder.expect(plan.steps)
        for kind in dict.fromkeys(step.kind for step in plan.steps):
            program = builder.program(next(step for step in plan.steps if step.kind == kind))
            yield Row.of(policy, hoist.value, kind, self._calls(program, cache))

    def uncached(self) -> Row:
        """The whole model as one graph, as torch.compile gets it."""
        nodes = [node for node in self.capture.graph.nodes if node.op == "call_function"]
        whole = outline(self.capture, self.structure, nodes, ()).segment
        return Row.of("torch.compile", Hoist.NOTHING.value, "full", [Lowering(self._stream).lower(whole)])

    def _calls(self, program: Program, cache: VariantCache) -> list[Lowered]:
        segments = {id(variant.function): variant.segment for variant in cache.variants}
        return [self._lower(segments[id(call.function)]) for call in program.calls]

    def _lower(self, segment: Segment) -> Lowered:
        if id(segment) not in self._lowered:
            self._lowered[id(segment)] = segment, Lowering(self._stream).lower(segment)
        return self._lowered[id(segment)][1]
