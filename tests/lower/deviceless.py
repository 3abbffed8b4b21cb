"""Lower the variants of a DiT block for an H200 on a machine without a GPU, and print what came out as JSON.

Inductor generates Triton from fake CUDA tensors once torch believes in a device, and Triton compiles that to cubins
with the ptxas of its wheel. The belief must not leak into other tests, so this is a program that runs in a process of
its own: ``TRITON_DUMP_PTXAS_LOG=1 python -m tests.lower.deviceless``. It knows internals of torch 2.13.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch.utils import _triton

from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import Capture, capture_model
from dicompile.config import DebugFolder, Settings
from dicompile.lower import Backend, Pieces, Program, ProgramBuilder, Variant, VariantCache, compile_segment
from dicompile.passes import ReuseClock, Segment, TokenCount
from dicompile.plan import COMPUTE, REUSE, Plan, TimestepSchedule, make_plan, plan_actions
from dicompile.policies import FORA, NoCache, ToCa

aten = torch.ops.aten

CUDA = torch.device("cuda", 0)
TARGET = ("cuda", 90, 32)
BATCH, TOKENS, HEADS, HEAD_WIDTH, LAYERS = 2, 256, 6, 64, 3
WIDTH = HEADS * HEAD_WIDTH
TFLOPS, DRAM_GB_PER_S, SHARED_MEMORY = 989.0, 4800.0, 232_448
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=139 << 30,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=SHARED_MEMORY, L2_cache_size=60 << 20,
    gcnArchName="", uuid="none",
)  # fmt: skip


@dataclass
class Kernel:
    """A Triton kernel: one entry per configuration that autotuning would try.

    Attributes:
        name: name at its first launch.
        cubin_bytes: size of the machine code.
        spilled_bytes: bytes that ptxas stores and loads because registers ran out; empty if its log could not be read.
    """

    name: str
    cubin_bytes: list[int] = field(default_factory=list)
    spilled_bytes: list[int] = field(default_factory=list)


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
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGET)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        del device
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


def always(value: object) -> Any:
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
    return aten.bitwise_not.default(value)


def _scalar_on_cpu(value: float, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.scalar_tensor(value, dtype=dtype)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """One fused call, as a CUDA build chooses; a CPU build knows none for CUDA and would write the products out."""
    assert mask is None
    assert not enable_gqa
    return aten._scaled_dot_product_flash_attention.default(query, key, value, dropout, causal, scale=scale)[0]


def dit(layers: int) -> Capture:
    """A narrow class-conditional DiT of diffusers in bfloat16, of which no weight ever exists."""
    from diffusers import DiTTransformer2DModel

    size = 2 * round(TOKENS**0.5)
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, in_channels=4, out_channels=8, num_layers=layers,
            sample_size=size, patch_size=2, attention_bias=True, activation_fn="gelu-approximate",
            num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
        )  # fmt: skip
        inputs = {
            "hidden_states": torch.empty(BATCH, 4, size, size, dtype=torch.bfloat16),
            "timestep": torch.empty(BATCH, dtype=torch.int64),
            "class_labels": torch.empty(BATCH, dtype=torch.int64),
            "return_dict": False,
        }
        return capture_model(model.to(torch.bfloat16).eval(), inputs)


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


def find_variants(capture: Capture) -> dict[str, Variant]:
    """Every variant of a block in the middle that the policies need, not compiled yet."""
    structure = analyse(capture)
    cache = VariantCache(Backend("eager"), Settings(), DebugFolder(None))
    builder = ProgramBuilder(Pieces(capture, structure), cache)

    def find(plan: Plan, step: int, piece: str) -> Variant:
        return _variant_of(builder.program(plan.steps[step]), piece, cache.variants)

    none = make_plan(structure, NoCache(), TimestepSchedule.of(1))
    fora = make_plan(structure, FORA(interval=2), TimestepSchedule.of(3))
    toca = make_plan(structure, ToCa(), TimestepSchedule.of(6))
    partial = [index for index, step in enumerate(toca.steps) if step.kind == "partial"]
    return {
        "compute": find(none, 0, "block1"),
        "compute and store": find(fora, 0, "block1"),
        "reuse": find(_reusing_one_block(structure), 1, "block1"),
        "reuse two blocks": find(fora, 1, "blocks0-1"),
        "compute, store and score": find(toca, partial[0] - 1, "block1"),
        "refresh": find(toca, partial[0], "block1"),
        "last refresh": find(toca, partial[-1], "block1"),
    }


def _reusing_one_block(structure: ModelStructure) -> Plan:
    rows = [tuple(COMPUTE for _ in structure.sites), tuple(REUSE if s.block == 1 else COMPUTE for s in structure.sites)]
    return plan_actions(structure, rows, TimestepSchedule.of(2), "reuse block 1")


def _variant_of(program: Program, piece: str, known: Iterable[Variant]) -> Variant:
    call = next(call for call in program.calls if call.name.startswith(f"{piece}:"))
    return next(variant for variant in known if variant.function is call.function)


class Lowering:
    """Lowers variants one by one and keeps every Triton kernel once, whatever its number in its variant.

    Args:
        stream: number of elements from which on a copy is one of a full-size tensor.
    """

    def __init__(self, stream: int = BATCH * TOKENS * WIDTH) -> None:
        self.stream = stream
        self.kernels: dict[str, tuple[str, str]] = {}
        self._code, self._bytes, self._least = "", 0, 0
        self._copies: set[str] = set()

    def lower(self, segment: Segment) -> Lowered:
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
            maps=len(re.findall(rf"empty_strided_cuda\(\([^()]*\b{TOKENS}, {TOKENS}\)", self._code)),
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
        sizes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
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


def compile_kernel(name: str, source: str) -> Kernel:
    """Compile a kernel in every configuration, and read what ptxas says about it."""
    autotuner, kernel = getattr(PyCodeCache.load(source), name), Kernel(name)
    for configuration in autotuner.configs:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = autotuner._precompile_config(configuration).kernel
        kernel.cubin_bytes.append(len(compiled.asm["cubin"]))
        stores = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        kernel.spilled_bytes += [int(stored) + int(loaded) for stored, loaded in stores]
    return kernel


def untrue_assumptions(capture: Capture) -> list[str]:
    """What was assumed of the symbolic ints and does not hold for every count of fewer than all tokens."""
    assert capture.fake_mode.shape_env is not None
    return [
        f"{guard.expr} fails for {value}"
        for guard in capture.fake_mode.shape_env.guards
        for value in range(1, TOKENS)
        if guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, value)) != sympy.true
    ]


def main() -> None:
    capture = dit(LAYERS)
    with pretended_cuda():
        move_to_cuda(capture)
        lowering = Lowering()
        variants = {name: asdict(lowering.lower(variant.segment)) for name, variant in find_variants(capture).items()}
        kernels = [asdict(compile_kernel(name, source)) for name, source in lowering.kernels.values()]
    found = {"variants": variants, "kernels": kernels, "untrue_assumptions": untrue_assumptions(capture)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
