"""Whatever else is done to a denoiser, before `optimize`, after it, or between runs, gives the same plan and results.

What cannot go together is refused by the same name in every order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from torch import Tensor

import dicompile
from dicompile.errors import AlreadyOptimized, UnsupportedModel
from dicompile.wrapper import CachedModel
from tests.pipelines import pipes
from tests.pipelines.pipes import Sampler, kinds

FORA = dicompile.FORA(interval=2)
STEPS = 4
OPTIMIZE, RUN = "optimize", "run"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def compile_component(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def quantise(pipe: Any) -> None:
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(pipe.transformer, library.Int8WeightOnlyConfig())


def add_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v", "linear_2"])
    pipe.transformer.add_adapter(config, adapter_name="first")


def fuse_lora(pipe: Any) -> None:
    add_lora(pipe)
    pipe.fuse_lora(components=["transformer"])


def unload_lora(pipe: Any) -> None:
    add_lora(pipe)
    pipe.unload_lora_weights()


def add_ip_adapter(pipe: Any) -> None:
    """Keys and values of a picture, in every joint block."""
    generator = torch.Generator().manual_seed(2)
    model = pipe.transformer
    width, inner = model.config.joint_attention_dim, model.inner_dim
    drawn = functools.partial(torch.randn, generator=generator)
    state: dict[str, dict[str, Tensor]] = {
        "image_proj": {
            "proj.weight": drawn(4 * width, 16), "proj.bias": drawn(4 * width),
            "norm.weight": drawn(width), "norm.bias": drawn(width),
        },
        "ip_adapter": {
            f"{i}.to_{part}_ip.{name}": drawn(inner, width) if name == "weight" else drawn(inner)
            for i in range(len(model.transformer_blocks)) for part in "kv" for name in ("weight", "bias")
        },
    }  # fmt: skip
    model._load_ip_adapter_weights([state])


def cast_layers(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload_whole(pipe: Any) -> None:
    accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")


def offload_groups(pipe: Any) -> None:
    pipe.enable_group_offload("cpu", "cpu", offload_type="leaf_level")


def offload_parts(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, "cpu")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "pipe.transformer = torch.compile(...)": compile_component,
    "pipe.transformer.compile()": lambda pipe: pipe.transformer.compile(backend="eager"),
    "compile_repeated_blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
    "quantise": quantise,
    "add an adapter": add_lora,
    "fuse an adapter": fuse_lora,
    "unload an adapter": unload_lora,
    "IP-adapter": add_ip_adapter,
    "cast layer by layer": cast_layers,
    "offload": offload_whole,
    "offload groups": offload_groups,
    "offload parts": offload_parts,
    "float64": lambda pipe: pipe.transformer.to(torch.float64).to(torch.float32),
    "fuse projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "attention backend": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
}
PAIRED = [
    name for name in CHANGES
    if "offload" not in name
    and name not in ("fuse an adapter", "unload an adapter", "float64", "attention backend")
]  # fmt: skip
# What other tests of this folder do not do, and what costs little.
OFTEN = ("pipe.transformer = torch.compile(...)", "pipe.transformer.compile()", "compile_repeated_blocks", "quantise")

REFUSED: dict[str, Callable[[Any], Any]] = {
    "first block cache": lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2)),
    "pyramid attention broadcast": lambda pipe: pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 300)
    ),
}


def called(sampler: Sampler) -> Tensor:
    """Latents of a run, with a picture for IP-adapters where there is one."""
    options: dict[str, Any] = {}
    if getattr(sampler.denoisers[0], "encoder_hid_proj", None) is not None:
        options = {f"{sign}ip_adapter_image_embeds": [torch.ones(1, 1, 16)] for sign in ("", "negative_")}
    return sampler(STEPS, **options)


def after(actions: Sequence[str], policy: Any = FORA) -> Sampler:
    """A pipeline to which things were done one after the other."""
    sampler = pipes.flux()
    for action in actions:
        if action == OPTIMIZE:
            dicompile.optimize(sampler.pipe, policy, backend="eager")
        elif action == RUN:
            called(sampler)
        else:
            {**CHANGES, **REFUSED}[action](sampler.pipe)
    return sampler


def outcome(actions: Sequence[str]) -> tuple[Tensor, str]:
    """Latents of a pipeline that caches as planned, and its plan."""
    sampler = after(actions)
    result = called(sampler)
    plan, report = dicompile.plan_of(sampler.pipe), dicompile.report(sampler.pipe)
    assert report.kinds == kinds(plan)
    assert report.kinds["reuse"]
    assert report.cold_starts == []
    return result, str(plan)


@pytest.mark.parametrize("change", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.nightly) for n in CHANGES])
@pytest.mark.sampled
def test_the_order_of_two_changes_nothing(change: str) -> None:
    torch._dynamo.reset()
    wanted, plan = outcome([change, OPTIMIZE])
    for actions in ([OPTIMIZE, change], [OPTIMIZE, RUN, change]):
        result, other = outcome(actions)
        assert torch.equal(result, wanted), actions
        assert other == plan, actions
    torch.testing.assert_close(called(after([OPTIMIZE, RUN, change], "none")), called(after([change])))


@pytest.mark.nightly
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PAIRED, 2)))
def test_the_order_of_three_changes_nothing(first: str, second: str) -> None:
    torch._dynamo.reset()
    try:
        called(after([first, second]))
    except Exception as error:
        pytest.skip(f"diffusers itself does not: {error}")
    orders = ([first, OPTIMIZE, second], [OPTIMIZE, first, RUN, second])
    if {first, second} == {"quantise", "cast layer by layer"}:
        for actions in ([first, second, OPTIMIZE], *orders):
            with pytest.raises(UnsupportedModel, match="are quantised and cast layer by layer"):
                outcome(actions)
        return
    wanted, plan = outcome([first, second, OPTIMIZE])
    for actions in orders:
        result, other = outcome(actions)
        assert torch.equal(result, wanted), actions
        assert other == plan, actions


def test_quantised_weights_can_be_moved_after_a_run() -> None:
    """torch exchanges them, and exchanges nothing that is referred to weakly."""
    sampler = after([OPTIMIZE, "quantise", RUN])
    wanted = called(sampler)
    sampler.pipe.transformer.to(torch.float64).to(torch.float32)
    assert torch.equal(called(sampler), wanted)


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("actions", [["{}", OPTIMIZE], [OPTIMIZE, "{}"], [OPTIMIZE, RUN, "{}"]])
def test_caches_of_others_are_refused_in_every_order(actions: Sequence[str], change: str) -> None:
    with pytest.raises(UnsupportedModel, match="FluxTransformer2DModel caches by itself"):
        called(after([action.format(change) for action in actions]))


def test_another_cache_that_was_disabled_is_no_matter() -> None:
    sampler = after(["pyramid attention broadcast"])
    sampler.pipe.transformer.disable_cache()
    dicompile.optimize(sampler.pipe, FORA, backend="eager")
    assert torch.equal(called(sampler), outcome([OPTIMIZE])[0])


def test_torch_compile_around_an_optimized_denoiser_hides_nothing() -> None:
    sampler = pipes.flux()
    original = sampler.pipe.transformer
    dicompile.optimize(sampler.pipe, FORA, backend="eager")
    compile_component(sampler.pipe)
    assert not isinstance(sampler.pipe.transformer, CachedModel)
    with pytest.raises(AlreadyOptimized):
        dicompile.optimize(sampler.pipe, FORA)
    with pytest.raises(AlreadyOptimized):
        dicompile.optimize(sampler.pipe.transformer, FORA)
    called(sampler)
    assert dicompile.report(sampler.pipe.transformer).kinds == dicompile.report(sampler.pipe).kinds
    assert dicompile.restore(sampler.pipe).transformer is original


def test_a_compiled_denoiser_comes_back_as_it_was_given() -> None:
    sampler = pipes.flux()
    compile_component(sampler.pipe)
    given = sampler.pipe.transformer
    dicompile.optimize(sampler.pipe, FORA, backend="eager")
    assert isinstance(sampler.pipe.transformer, CachedModel)
    assert dicompile.restore(sampler.pipe).transformer is given
