"""Autocast in and around a forward: the captured graph holds its casts and computes bitwise what the model computes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dicompile
from dicompile.capture import Arguments, Capture, Captured, capture_by_dynamo, capture_model, normalised, values_of
from dicompile.capture.autocast import autocast_key, make_autocast_explicit
from dicompile.capture.trace import capture_by_running
from dicompile.errors import CannotCapture
from dicompile.wrapper import record_of
from tests.models import PlainBlock, PlainDiT, Sample, call, flux, plain_dit, redraw, run, structure, timesteps
from tests.runtime.reference import Reference

WIDTH = 16
Compute = Callable[["Weights", Tensor], Tensor]


class Weights(nn.Module):
    """What the operators under test take beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.image = nn.Parameter(torch.randn(2, 8, 6, 6))
        self.kernel, self.mix = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)


def linear(m: Weights, x: Tensor) -> Tensor:
    return F.linear(x, m.w, m.b)


def conv(m: Weights, _: Tensor) -> Tensor:
    return F.conv2d(m.image, m.kernel, padding=1)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def attend(m: Weights, x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(heads(linear(m, x)), heads(linear(m, x)), heads(x), **options)


def write(m: Weights, x: Tensor) -> Tensor:
    h = linear(m, x)
    h[:, 0] = 1
    h.add_(x)
    h[..., ::2] *= 2
    return h


def there_and_back(m: Weights, x: Tensor) -> Tensor:
    h = linear(m, x)
    return F.linear(h.float(), m.w).type_as(h) + h.to(torch.float32).mean(-1, keepdim=True)


def rotate(m: Weights, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(linear(m, x).float().unflatten(-1, (-1, 2)))
    turns = torch.polar(torch.ones(8, 8), torch.linspace(0, 6, 64).view(8, 8))
    return torch.view_as_real(pairs * turns).flatten(2)


def put(m: Weights, x: Tensor) -> Tensor:
    h = linear(m, x).clone()
    h[:, torch.tensor([0, 2])] = x[:, :2].to(h.dtype)
    return torch.index_put(x, (torch.tensor([0, 1]),), h.float())


def with_other_switches(m: Weights, x: Tensor) -> Tensor:
    with torch.enable_grad(), torch.inference_mode():
        y = (x * 1).view(-1, WIDTH)
        y.mul_(2)
    return without_gradients(m, y)


@torch.no_grad()
def without_gradients(m: Weights, x: Tensor) -> Tensor:
    return linear(m, x) * 2


# Listed by autocast, composites of what is listed, operators that read or promote what comes out of these.
OPERATORS: dict[str, Compute] = {
    "linear": linear,
    "matmul of 3 axes": lambda m, x: x @ m.w,
    "batched matmul": lambda _, x: x @ x.mT,
    "bmm": lambda _, x: torch.bmm(x, x.mT),
    "mm": lambda m, x: torch.mm(x[0], m.w),
    "mv": lambda m, _: torch.mv(m.w, m.b),
    "addmm": lambda m, x: torch.addmm(m.b, x[0], m.w),
    "baddbmm": lambda _, x: torch.baddbmm(x @ x.mT, x, x.mT),
    "einsum": lambda m, x: torch.einsum("bnd,ed->bne", x, m.w),
    "einsum of 3": lambda m, x: torch.einsum("bnd,de,bme->bnm", x, m.w, x),
    "einsum of heads": lambda _, x: torch.einsum("bhqd,bhkd->bhqk", heads(x), heads(x)),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, 1),
    "inner": lambda m, x: torch.inner(x, m.w),
    "multi_dot": lambda m, x: x @ torch.linalg.multi_dot([m.w, m.w, m.w]),
    "bilinear": lambda m, x: F.bilinear(x, x, m.mix),
    "conv2d": conv,
    "conv2d of the same size": lambda m, _: F.conv2d(m.image, m.kernel, padding="same"),
    "conv1d": lambda m, x: F.conv1d(x, m.kernel[..., 0]),
    "conv_transpose2d": lambda m, _: F.conv_transpose2d(m.image, m.kernel),
    "attention": attend,
    "attention with a mask": lambda m, x: attend(m, x, attn_mask=torch.ones(8, 8, dtype=torch.bool).tril()),
    "attention with a bias": lambda m, x: attend(m, x, attn_mask=torch.zeros(8, 8)),
    "multi-head attention": lambda m, x: m.attention(x, x, x)[0],
    "multi-head attention without weights": lambda m, x: m.attention(x, x, x, need_weights=False)[0],
    "encoder layer": lambda m, x: m.layer(x),
    "layer_norm": lambda m, x: F.layer_norm(linear(m, x), (WIDTH,), m.b, m.b),
    "layer_norm without weights": lambda m, x: F.layer_norm(linear(m, x), (WIDTH,)),
    "group_norm": lambda m, x: F.group_norm(conv(m, x), 2, m.b[:8], m.b[:8]),
    "rms_norm": lambda m, x: F.rms_norm(linear(m, x), (WIDTH,)),
    "rms_norm with weights": lambda m, x: F.rms_norm(linear(m, x), (WIDTH,), m.b),
    "batch_norm": lambda m, x: F.batch_norm(conv(m, x), m.b[:8], m.b[:8].abs()),
    "normalize": lambda m, x: F.normalize(linear(m, x), dim=-1),
    "softmax": lambda m, x: linear(m, x).softmax(-1),
    "softmax in float32": lambda m, x: F.softmax(linear(m, x), -1, dtype=torch.float32),
    "sum": lambda m, x: linear(m, x).sum(-1),
    "prod": lambda m, x: linear(m, x).prod(-1),
    "cumsum": lambda m, x: linear(m, x).cumsum(-1),
    "pow": lambda m, x: linear(m, x) ** 2,
    "gelu": lambda m, x: F.gelu(linear(m, x), approximate="tanh"),
    "glu": lambda m, x: F.glu(linear(m, x)),
    "cat": lambda m, x: torch.cat([linear(m, x), x]),
    "stack": lambda m, x: torch.stack([linear(m, x), x]),
    "addcdiv": lambda m, x: torch.addcdiv(x, linear(m, x).float(), x),
    "where": lambda m, x: torch.where(x > 0, x, linear(m, x)),
    "index_put": put,
    "scatter_add": lambda m, x: x.scatter_add(1, torch.zeros(2, 8, WIDTH, dtype=torch.long), linear(m, x).float()),
    "prelu": lambda m, x: F.prelu(linear(m, x), m.b[:1]),
    "cosine_similarity": lambda m, x: F.cosine_similarity(linear(m, x), x, dim=-1),
    "cdist": lambda m, x: torch.cdist(linear(m, x), x),
    "mse_loss": lambda m, x: F.mse_loss(linear(m, x), x),
    "interpolate": lambda m, x: F.interpolate(conv(m, x), scale_factor=2, mode="bilinear"),
    "pad": lambda m, x: F.pad(conv(m, x), (1, 1, 1, 1), mode="reflect"),
    "embedding": lambda m, _: F.linear(F.embedding(torch.tensor([1, 2]), m.w), m.w),
    "float64": lambda m, x: F.linear(x.double(), m.w.double()),
    "rotation": rotate,
    "writes": write,
    "there and back": there_and_back,
    "a choice by dtype": lambda m, x: linear(m, x) * (2 if linear(m, x).dtype == torch.float32 else 3),
    "constants": lambda m, x: linear(m, x * torch.tensor([1.0, 2.0] * 8)) + torch.tensor(3.0),
    "other switches": with_other_switches,
}  # fmt: skip


class Everything(Weights):
    """All operators, in a region or as they are; `settings` are those of the region."""

    def __init__(self, names: list[str], **settings: Any) -> None:
        super().__init__()
        self.names, self.settings = names, settings

    def forward(self, x: Tensor, t: Tensor) -> list[Tensor]:
        x = x * torch.cos(t)[:, None, None]
        if not self.settings:
            return [OPERATORS[name](self, x) for name in self.names]
        with torch.autocast("cpu", **self.settings):
            found = [OPERATORS[name](self, x) for name in self.names]
        return [*found, linear(self, x)]


def given() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 8, WIDTH), "t": torch.rand(2)}


def captured_by(
    way: Callable[[nn.Module, Arguments], Captured], model: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Capture, Sequence[Tensor]]:
    arguments = Arguments.of((), inputs)
    found = way(model, arguments)
    values = values_of(model, found, arguments)
    return normalised(model, found, values), values


by_dynamo = functools.partial(captured_by, capture_by_dynamo)
by_running = functools.partial(captured_by, capture_by_running)


def results(captured: tuple[Capture, Sequence[Tensor]]) -> list[Tensor]:
    capture, arguments = captured
    with torch.no_grad():
        return capture.graph_module(*arguments)


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """Attention modules call one fused operator where nothing is compiled or traced, which rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


BF16, F16 = torch.bfloat16, torch.float16


def around(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    ("settings", "ambient", "front_end"),
    [
        pytest.param({"dtype": BF16}, None, by_dynamo, id="region, Dynamo"),
        pytest.param({"dtype": BF16}, None, by_running, id="region, run"),
        pytest.param({}, F16, by_dynamo, id="around, Dynamo"),
        pytest.param({}, BF16, by_running, id="around, run"),
        pytest.param({"enabled": False}, F16, by_dynamo, id="off inside, Dynamo"),
        pytest.param({"enabled": False}, BF16, by_running, id="off inside, run"),
        # With its cache on, torch itself takes weights that it cast to the dtype of the other region.
        pytest.param({"dtype": F16, "cache_enabled": False}, BF16, by_dynamo, id="another inside, Dynamo"),
    ],
)
@pytest.mark.sampled
def test_every_operator_gives_bitwise_what_it_gives_under_autocast(
    settings: dict[str, Any], ambient: torch.dtype | None, front_end: Callable[..., Any]
) -> None:
    model, inputs = Everything(list(OPERATORS), **settings).eval(), given()
    with torch.no_grad(), around(ambient):
        expected = model(**inputs)
        captured = front_end(model, inputs)
    names = [*OPERATORS, "after"][: len(expected)]
    pairs = zip(names, results(captured), expected, strict=True)
    assert not [f"{name}: {a.dtype} for {b.dtype}" for name, a, b in pairs if a.dtype != b.dtype or not a.equal(b)]


class Nests(nn.Module):
    """A region with one in it that is switched off; reads its mask in Python if it is to be captured by running it."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        if self.reads and not mask.all():
            return x
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.first(x * torch.cos(t)[:, None, None])
            with torch.autocast("cpu", enabled=False):
                h = self.second(h.float())
            return x + self.first(F.softmax(h, -1))


TEXT = """\
t: f32[2] = input
x: f32[2,8,16] = input
@first.weight: f32[16,16] = input
@first.bias: f32[16] = input
@second.weight: f32[16,16] = input
@second.bias: f32[16] = input
%6: f32[2] = aten.cos.default(t)
%7: f32[2,1] = aten.unsqueeze.default(%6, 1)
%8: f32[2,1,1] = aten.unsqueeze.default(%7, 2)
%9: f32[2,8,16] = aten.mul.Tensor(x, %8)
%10: bf16[16] = aten._to_copy.default(@first.bias, dtype=torch.bfloat16)  # first
%11: bf16[16,16] = aten._to_copy.default(@first.weight, dtype=torch.bfloat16)  # first
%12: bf16[2,8,16] = aten._to_copy.default(%9, dtype=torch.bfloat16)  # first
%13: bf16[2,8,16] = aten.linear.default(%12, %11, %10)  # first
%14: f32[2,8,16] = aten._to_copy.default(%13, dtype=torch.float32)
%15: f32[2,8,16] = aten.linear.default(%14, @second.weight, @second.bias)  # second
%16: f32[2,8,16] = aten.softmax.int(%15, -1)
%17: bf16[2,8,16] = aten._to_copy.default(%16, dtype=torch.bfloat16)  # first
%18: bf16[2,8,16] = aten.linear.default(%17, %11, %10)  # first
%19: f32[2,8,16] = aten.add.Tensor(x, %18)
return %19"""


def nested(reads: bool = False) -> tuple[Nests, dict[str, Tensor]]:
    return Nests(reads).eval(), {**given(), "mask": torch.ones(2, dtype=torch.bool)}


def test_casts_stand_in_the_graph_each_of_a_weight_once() -> None:
    model, inputs = nested()
    assert str(capture_model(model, inputs)) == TEXT


@pytest.mark.parametrize("ambient", [None, torch.bfloat16])
def test_both_front_ends_make_the_same_of_regions(ambient: torch.dtype | None) -> None:
    model, inputs = nested()
    with around(ambient):
        _, by_graph = str(by_dynamo(model, inputs)[0]).split("%", 1)
        _, by_run = str(by_running(model, inputs)[0]).split("%", 1)
    assert [line.split(" = ")[1].split("(")[0] for line in by_graph.splitlines()[:-1]] == [
        line.split(" = ")[1].split("(")[0] for line in by_run.splitlines()[:-1]
    ]


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("mode", ["eager", "inductor"])
@pytest.mark.sampled
def test_an_optimized_model_follows_autocast_from_call_to_call(reads: bool, mode: str) -> None:
    module, inputs = nested(reads)
    model = dicompile.optimize(module, "none", mode=mode)
    with torch.no_grad():
        for ambient in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
            with around(ambient):
                wanted, got = module(**inputs), model(**inputs)
                assert autocast_key() == ((("cpu", ambient),) if ambient else ())
            assert got.dtype == wanted.dtype
            # Inductor's sums are its own.
            torch.testing.assert_close(got, wanted, rtol=0, atol=0 if mode == "eager" else 2e-2)
    assert record_of(model).calls.is_run == reads


def untouched(model: nn.Module, inputs: dict[str, Tensor]) -> fx.GraphModule:
    """Dynamo's graph, which is not rewritten."""
    seen: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**inputs)
    assert make_autocast_explicit(seen[0], []) is seen[0]
    return seen[0]


def test_a_graph_without_autocast_is_left_alone() -> None:
    untouched(*plain_dit(layers=1))


def test_regions_that_switch_off_what_is_off_are_dropped() -> None:
    model, inputs = Everything(["linear"], enabled=False).eval(), given()
    assert "_enter_autocast" in str(untouched(model, inputs).graph)
    assert "autocast" not in str(by_dynamo(model, inputs)[0]) + str(by_running(model, inputs)[0])
    with around(torch.bfloat16):
        captured = by_dynamo(model, inputs)
    assert results(captured)[0].dtype == torch.float32


class CastBlock(PlainBlock):
    def attended(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().attended(x).float()


def partly_cast() -> Sample:
    model = PlainDiT(1)
    model.blocks = nn.ModuleList([CastBlock(model.width, 2)])
    return Sample(redraw(model), plain_dit().inputs)


@pytest.mark.parametrize("ambient", [None, torch.bfloat16])
@pytest.mark.parametrize("mode", ["eager", "inductor"])
@pytest.mark.sampled
def test_a_model_with_attention_under_autocast_computes_the_same(mode: str, ambient: torch.dtype | None) -> None:
    sample = partly_cast()
    model = dicompile.optimize(sample.model, "none", schedule=timesteps(2), mode=mode)
    with around(ambient):
        found, expected = (run(each, sample.inputs, timesteps(2)) for each in (model, sample.model))
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        # Inductor keeps float32 between operators that it fuses.
        torch.testing.assert_close(got, wanted, rtol=0, atol=0 if mode == "eager" else 5e-2)


@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_a_policy_caches_a_model_with_attention_under_autocast(mode: str) -> None:
    sample, steps = partly_cast(), timesteps(4)
    model = dicompile.optimize(sample.model, "fora", schedule=steps, mode=mode)
    found = run(model, sample.inputs, steps)
    plan = dicompile.plan_of(model)
    rows = [[site.action for site in step.sites] for step in plan.steps]
    assert len({step.kind for step in plan.steps}) > 1 and len(rows[0]) >= 2
    reference = Reference(sample.model, [row[:2] for row in rows])
    for i, (t, got) in enumerate(zip(steps, found, strict=True)):
        latent = torch.randn(sample.inputs["x"].shape, generator=torch.Generator().manual_seed(i))
        wanted = reference.step(i, latent, torch.full((4,), t), sample.inputs["y"], {})
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if mode == "eager" else 5e-2)


def test_autocast_around_a_whole_model_leaves_its_structure_and_computes_the_same() -> None:
    sample, steps = flux(1), timesteps(2)
    model = dicompile.optimize(sample.model, "none", schedule=steps, mode="eager")
    with around(torch.bfloat16):
        found, wanted = (run(each, sample.inputs, steps) for each in (model, sample.model))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    sites = [(site.name, site.kind) for site in dicompile.structure_of(model).sites]
    assert sites == [(site.name, site.kind) for site in structure(sample).sites]


def test_steps_that_are_compiled_ahead_do_not_depend_on_autocast_there() -> None:
    sample, steps = partly_cast(), timesteps(3)
    model = dicompile.optimize(sample.model, "fora", schedule=steps, mode="eager")
    wanted = run(dicompile.optimize(sample.model, "fora", schedule=steps, mode="eager"), sample.inputs, steps)
    call(model, sample.inputs, steps[0], 0)
    with around(torch.bfloat16):
        dicompile.prepare(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model, sample.inputs, steps), wanted, strict=True))


class OnCuda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(WIDTH, WIDTH, device="cuda"))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            h = F.layer_norm(F.linear(x, self.w), (WIDTH,))
            return x + h * F.linear(x, self.w).softmax(-1)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*Disabling")
def test_regions_of_a_device_that_is_not_here_are_written_out_for_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 8, WIDTH, device="cuda")
        lines = str(capture_model(OnCuda(), {"x": x})).splitlines()
    normed = next(line for line in lines if "layer_norm" in line)
    assert [line.split(" = ")[0].split(": ")[1] for line in lines if "linear.default" in line] == ["f16[2,8,16]"] * 2
    assert normed.split(": ")[1].startswith("f32") and "_to_copy.default" in lines[lines.index(normed) - 1]
    assert "f32[2,8,16] = aten.softmax.int(" in str(lines)


@torch.library.custom_op("dicompile_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)
doubled.register_autocast("cpu", torch.bfloat16)


class Doubles(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return doubled(x * torch.cos(t)[:, None, None])


@pytest.mark.parametrize("front_end", [by_dynamo, by_running])
def test_an_operator_that_registers_its_casts_gets_them(front_end: Callable[..., Any]) -> None:
    model, inputs = Doubles(), given()
    (got,) = results(front_end(model, inputs))
    assert got.dtype == torch.bfloat16 and torch.equal(got, model(**inputs))


class Checkpoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = x * torch.cos(t)[:, None, None]
            return torch.utils.checkpoint.checkpoint(self.linear, h, use_reentrant=False)


def test_a_region_under_autocast_is_what_is_in_it() -> None:
    model, inputs = Checkpoints().eval(), given()
    with torch.no_grad():
        assert torch.equal(results(by_dynamo(model, inputs))[0], model(**inputs))
        assert torch.equal(results(by_running(model, inputs))[0], model(**inputs))


def test_an_operator_without_end_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicompile.capture.autocast._MAX_ROUNDS", 1)
    with pytest.raises(CannotCapture, match=r"what autocast does to aten\.einsum\.default cannot be written out"):
        by_dynamo(Everything(["einsum"], dtype=torch.bfloat16), given())
