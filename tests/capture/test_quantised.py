"""Quantised weights: the same sites and plans as without, cached alike, and what the quantised model computes."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import re
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dicompile
from dicompile.analysis import analyse
from dicompile.capture import capture_model
from dicompile.errors import CannotCapture
from dicompile.lower import written_out
from dicompile.ops.wrapped import WRAPPED_LINEAR
from tests.models import MODELS, PlainDiT, Sample, frames_of, plain_dit, redraw, timesteps

STEPS = 4
FORA = dicompile.FORA(interval=2)
POLICIES = (FORA, "toca", "duca")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries, with this torch
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torchao.*:UserWarning"),
]


def blocks_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of the blocks, which are what is quantised."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n}


def torchao(config: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        library = pytest.importorskip("torchao.quantization")
        library.quantize_(model, getattr(library, config)(**options), filter_fn=lambda m, name: name in blocks)
        return model

    def with_blocks(model: nn.Module) -> nn.Module:
        nonlocal blocks
        blocks = blocks_of(model)
        return quantise(model)

    blocks: dict[str, nn.Linear] = {}
    return with_blocks


def float8_dynamic(model: nn.Module) -> nn.Module:
    """Activations are rounded, too; torchao asks for a GPU that multiplies such numbers, though a CPU can."""
    api = pytest.importorskip("torchao.quantization.quant_api")
    with unittest.mock.patch.object(api, "_check_hardware_support", lambda granularity: None):
        made = torchao("Float8DynamicActivationFloat8WeightConfig")(model)
    assert all(layer.weight.act_quant_kwargs is not None for layer in blocks_of(made).values())
    return made


def quanto(weights: str) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        library.quantize(model, weights=getattr(library, weights), include=list(blocks_of(model)))
        library.freeze(model)
        return model

    return quantise


def gguf(model: nn.Module) -> nn.Module:
    """As diffusers loads a file of GGUF: linear layers that decompress their weight when they run."""
    library = pytest.importorskip("gguf", reason="gguf is not installed")
    utils = importlib.import_module("diffusers.quantizers.gguf.utils")
    kind = library.GGMLQuantizationType.Q8_0
    for name, layer in blocks_of(model).items():
        data = torch.from_numpy(library.quantize(layer.weight.detach().float().numpy(), kind).copy())
        made = utils.GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype)
        made.weight, made.bias = utils.GGUFParameter(data, quant_type=kind), layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)
    return model


def bitsandbytes(model: nn.Module) -> nn.Module:
    """NF4, as its layers hold it on a CPU."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for name, layer in blocks_of(model).items():
        made = library.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, quant_type="nf4"
        )
        made.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to("cpu"))
    return model


QUANTISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao int8 dynamic, int4": torchao("Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao float8 dynamic": float8_dynamic,
    "quanto int8": quanto("qint8"),
    "quanto float8": quanto("qfloat8"),
    "quanto int4": quanto("qint4"),
    "gguf": gguf,
}


def in_half(name: str, layers: int = 2) -> Sample:
    """A model and its inputs in bfloat16, as quantised weights come."""
    sample = MODELS[name](layers)
    return Sample(sample.model.bfloat16(), {n: cast(v) for n, v in sample.inputs.items()})


def cast(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs of all steps."""
    found = []
    for step, time in enumerate(timesteps(STEPS)):
        latent = next(name for name in ("hidden_states", "x") if name in inputs)
        moment = next(name for name in ("timestep", "t") if name in inputs)
        generator = torch.Generator().manual_seed(step)
        drawn = torch.randn(inputs[latent].shape, generator=generator).to(inputs[latent].dtype)
        at = torch.full_like(inputs[moment], time / 1000 if inputs[moment].is_floating_point() else time)
        with torch.no_grad():
            output = model(**{**inputs, latent: drawn, moment: at})
        found.append(output[0] if isinstance(output, tuple) else output)
    return found


def optimized(model: nn.Module, policy: Any, **options: Any) -> Any:
    return dicompile.optimize(model, policy, schedule=timesteps(STEPS), **{"backend": "eager", **options})


def described(structure: Any) -> list[Any]:
    """What policies and plans are made by."""
    return [
        [(s.kind, s.stream, s.name, s.block, s.shape, s.flops, str(s.tokens)) for s in structure.sites],
        [(block.path, block.sites) for block in structure.blocks],
        structure.flops,
        structure.grid,
        sorted(structure.invariant_flops.items(), key=str),
    ]


@functools.cache
def of_plain(name: str) -> tuple[Any, list[tuple[str, Any]]]:
    """What policies and plans are made by of a model without, and for every policy its plan and its kinds of steps."""
    sample, found = in_half(name, 1), []
    for policy in POLICIES:
        run(cached := optimized(sample.model, policy), sample.inputs)
        found.append((plan_text(cached), dicompile.report(cached).kinds))
    return described(analyse(capture_model(sample.model, sample.inputs))), found


def plan_text(model: Any) -> str:
    """A plan but for its predicted speedup: quantised weights are fewer bytes."""
    return re.sub(r"predicted \S+x", "", str(dicompile.plan_of(model)))


SCORED = 0.02
"""Difference of a full step in bfloat16 whose attention scores tokens, relative to the largest output."""

CLOSE = {"torchao float8 dynamic": 0.02}
"""Distance of compiled code from eager, relative, where it is more than 0.01; torch.compile is at 0.04 to 0.08."""

FEW = ("torchao int8 dynamic", "gguf")
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in itertools.product(["flux"], FEW) else pytest.mark.nightly)
    for name in ("flux", "pixart") for kind in QUANTISED
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.sampled
def test_sites_plans_and_steps_are_those_of_the_model_without(name: str, kind: str) -> None:
    structure, planned = of_plain(name)
    sample = in_half(name, 1)
    model = QUANTISED[kind](sample.model)
    assert described(analyse(capture_model(model, sample.inputs))) == structure
    wanted = run(model, sample.inputs)
    none = run(optimized(model, "none"), sample.inputs)
    assert all(torch.equal(got, eager) for got, eager in zip(none, wanted, strict=True))
    for policy, plan in zip(POLICIES, planned, strict=True):
        cached = optimized(model, policy)
        got = run(cached, sample.inputs)
        assert (plan_text(cached), dicompile.report(cached).kinds) == plan
        for step, eager, result in zip(dicompile.plan_of(cached).steps, wanted, got, strict=True):
            if any(site.score for site in step.sites):  # attention and score are made of the same weights, in float32
                assert (result - eager).abs().max() < SCORED * eager.abs().max()
            else:
                assert torch.equal(result, eager) == (step.kind == "full")


def test_four_bits_of_bitsandbytes_are_linear_maps() -> None:
    plain = Sample(redraw(PlainDiT(1, width=64)), plain_dit().inputs)
    model = bitsandbytes(copy.deepcopy(plain.model))
    wanted = run(model, plain.inputs)
    assert (
        described(analyse(capture_model(model, plain.inputs)))[:3]
        == described(analyse(capture_model(plain.model, plain.inputs)))[:3]
    )
    for got, eager in zip(run(optimized(model, "none"), plain.inputs), wanted, strict=True):
        assert torch.equal(got, eager)
    run(cached := optimized(model, "toca"), plain.inputs)
    assert dicompile.report(cached).kinds["partial"]


@pytest.mark.parametrize("batches", [(4,), pytest.param((4, 2, 1), marks=pytest.mark.nightly)])
@pytest.mark.nightly
def test_compiled_code_computes_what_the_library_does(batches: tuple[int, ...]) -> None:
    sample = plain_dit(1)
    model = QUANTISED["torchao int8"](sample.model)
    compiled = optimized(model, FORA, backend="inductor")
    for batch in batches:
        inputs = {name: value[:batch] for name, value in sample.inputs.items()}
        wanted, got = run(model, inputs), run(compiled, inputs)
        for step, eager, result in zip(dicompile.plan_of(compiled).steps, wanted, got, strict=True):
            if step.kind == "full":
                torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-5)
    assert dicompile.report(compiled).kinds == {"full": 3, "reuse": 1}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [name for name in QUANTISED if name not in ("torchao int8", "quanto int4", "gguf")])
def test_compiled_code_is_close_to_the_library(kind: str) -> None:
    """Activations that are rounded may round the other way where products are fused."""
    sample = in_half("flux", 1)
    model = QUANTISED[kind](sample.model)
    compiled = optimized(model, FORA, backend="inductor")
    wanted, got = run(model, sample.inputs), run(compiled, sample.inputs)
    for step, eager, result in zip(dicompile.plan_of(compiled).steps, wanted, got, strict=True):
        if step.kind == "full":
            assert (result - eager).norm() < CLOSE.get(kind, 0.01) * eager.norm()


def test_weights_that_are_quantised_anew_are_seen() -> None:
    sample = plain_dit(2)
    other, model = QUANTISED["torchao int8"](redraw(PlainDiT(2), 1)), QUANTISED["torchao int8"](sample.model)
    cached = optimized(model, "none")
    run(cached, sample.inputs)
    for ours, theirs in zip(blocks_of(model).values(), blocks_of(other).values(), strict=True):
        ours.weight = theirs.weight
    for got, eager in zip(run(cached, sample.inputs), run(model, sample.inputs), strict=True):
        assert torch.equal(got, eager)
    assert len(frames_of(cached)) == 1
    with torch.no_grad():
        model.blocks[0].proj.weight.scale.mul_(2)
    for got, eager in zip(run(cached, sample.inputs), run(model, sample.inputs), strict=True):
        assert torch.equal(got, eager)


def test_a_weight_that_is_put_together_in_another_way_is_captured_anew() -> None:
    sample = plain_dit(2)
    model = QUANTISED["torchao int8"](sample.model)
    dynamic = QUANTISED["torchao int8 dynamic"](redraw(PlainDiT(2), 1))
    cached = optimized(model, "none")
    run(cached, sample.inputs)
    model.blocks[1].proj.weight = dynamic.blocks[1].proj.weight
    for got, eager in zip(run(cached, sample.inputs), run(model, sample.inputs), strict=True):
        assert torch.equal(got, eager)
    assert len(frames_of(cached)) == 2


def test_what_is_no_linear_map_is_traced_into_its_library() -> None:
    """The embedding of the latent is a product with the weight by hand; the library says what that is."""

    class ByHand(PlainDiT):
        def tokens(self, x: Tensor) -> Tensor:
            made: Tensor = super().tokens(x)
            return made + made @ self.blocks[0].proj.weight.dequantize()

    model = QUANTISED["torchao int8"](redraw(ByHand(2)))
    inputs = plain_dit().inputs
    graph = capture_model(model, inputs).graph
    assert len(graph.find_nodes(op="call_function", target=WRAPPED_LINEAR)) == len(blocks_of(model))
    for got, eager in zip(run(optimized(model, "none"), inputs), run(model, inputs), strict=True):
        torch.testing.assert_close(got, eager)


class Halved(Tensor):
    """A weight of half the values, in the simplest class that torch lets consist of others."""

    note: Any
    half: Tensor

    @staticmethod
    def __new__(cls, half: Tensor, note: Any) -> Halved:
        made: Halved = Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)
        made.half, made.note = half, note
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["half"], self.note() if callable(self.note) else self.note

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], note: Any, *_: Any) -> Halved:
        return Halved(inner["half"], note)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].half * 2, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Halved(args[0].half.detach(), args[0].note)
        raise NotImplementedError(func)


def halved(note: Any) -> Sample:
    sample = plain_dit(2)
    for layer in blocks_of(sample.model).values():
        layer.weight = nn.Parameter(Halved(layer.weight.detach() / 2, note), requires_grad=False)
    return sample


def test_a_class_that_nobody_has_heard_of_is_captured() -> None:
    model, inputs = halved("a note")
    structure = described(analyse(capture_model(plain_dit(2).model, inputs)))
    assert described(analyse(capture_model(model, inputs))) == structure
    for got, eager in zip(run(optimized(model, "none"), inputs), run(model, inputs), strict=True):
        assert torch.equal(got, eager)


def test_a_class_that_does_not_say_the_same_twice_is_refused() -> None:
    model, inputs = halved(object)
    with pytest.raises(CannotCapture) as caught:
        run(optimized(model, "none"), inputs)
    assert "Halved" in f"{caught.value}{caught.value.__cause__}"


def test_eight_bits_of_bitsandbytes_that_look_for_outliers_are_refused() -> None:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = redraw(PlainDiT(2))
    for block in model.blocks:
        layer = block.proj
        block.proj = library.nn.Linear8bitLt(32, 32, has_fp16_weights=False, threshold=6.0)
        block.proj.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        block.proj.bias = layer.bias
    with pytest.raises(CannotCapture):
        run(optimized(model, FORA), plain_dit().inputs)


def test_what_a_library_computes_and_nobody_can_trace_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def untraceable(*_: object) -> Tensor:
        raise RuntimeError("Unable to cast NotImplemented to Tensor\n\nWhile executing")

    sample = plain_dit(1)
    model = optimized(QUANTISED["torchao int8"](sample.model), "none", backend="inductor")
    monkeypatch.setattr(written_out, "linear_of", untraceable)
    with pytest.raises(CannotCapture) as caught:
        run(model, sample.inputs)
    assert str(caught.value) == (
        "weights of class Int8Tensor cannot be compiled\n"
        "  where: lower, linear maps\n"
        "  why:   what their library computes cannot be traced: Unable to cast NotImplemented to Tensor\n"
        "  fix:   backend='eager', which computes what the library does, or weights of another library, such as torchao"
    )
