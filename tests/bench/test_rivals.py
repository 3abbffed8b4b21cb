"""Opponents run, or are named with the reason; what saves operations is counted, whoever saves them."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from dicompile.bench import rivals
from dicompile.bench.contestants import Contestant, DoesNotFit, warm_up
from dicompile.bench.models import SUBJECTS
from dicompile.bench.rivals import count_flops, prepare
from dicompile.bench.workload import Workload

STEPS = 4


def workload_of(name: str) -> Workload:
    subject = SUBJECTS[name]
    return Workload.of(subject, subject.size("quick"), STEPS, "cpu", torch.float32)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo takes seconds, and what is compiled is not what these tests are about."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def shares(contestant: Contestant) -> list[float]:
    return [round(flops / max(contestant.flops), 2) for flops in contestant.flops]


def test_uncached_steps_all_take_the_same_operations() -> None:
    workload = workload_of("dit")
    counts = count_flops(prepare("eager", workload), workload)
    assert len(counts) == STEPS
    assert len(set(counts)) == 1
    width, tokens, rows = 64, 16, 2
    a_block = rows * tokens * 2 * (4 + 8) * width**2 + rows * 4 * tokens**2 * width  # products, and attention
    assert 2 * a_block < counts[0] < 3.2 * a_block


def test_a_hook_of_diffusers_is_told_apart_by_the_operations_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    monkeypatch.setattr(rivals, "THRESHOLDS", (1e-9, 100.0))
    chosen = prepare("first-block", workload_of("flux"))
    assert chosen.setting == "threshold 100"
    full, *reused = shares(chosen)
    assert full == 1.0
    assert set(reused) == {reused[0]}
    assert 0.4 < reused[0] < 0.7  # the first of two blocks
    assert chosen.kinds == ["full", *[f"{reused[0]:.0%}"] * 3]
    assert chosen.flop_speedup(STEPS) == pytest.approx(STEPS / (1 + 3 * reused[0]), rel=0.02)


@pytest.mark.parametrize(
    ("counts", "setting"),
    [
        ({"a": [4, 4], "b": [4, 0], "c": [4, 0]}, "b"),
        ({"a": [4, 4], "b": [4, 3], "c": [4, 2]}, "c"),
    ],
)
def test_the_first_setting_that_takes_half_of_the_operations_is_chosen_else_the_last(
    counts: dict[str, list[int]], setting: str, monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    monkeypatch.setattr(rivals, "count_flops", lambda contestant, _: counts[contestant.name])
    chosen = rivals._first_that_halves(
        [(name, name) for name in counts],
        lambda module, name: Contestant(name, module, 0),
        workload_of("dit"),
        lambda _: None,
    )
    assert (chosen.setting, chosen.flops) == (setting, tuple(counts[setting]))


def test_a_generation_of_a_hook_begins_anew(uncompiled: None) -> None:
    workload = workload_of("wan")
    chosen = prepare("magcache", workload)
    assert shares(chosen)[0] == 1.0
    assert min(chosen.flops) < max(chosen.flops)
    assert count_flops(chosen, workload) == count_flops(chosen, workload) == list(chosen.flops)


@pytest.mark.parametrize(("name", "compiled"), [("magcache", "WanTransformerBlock"), ("pab", "WanAttention")])
def test_hooks_go_around_what_is_compiled(name: str, compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def compile_(forward: Any, backend: str) -> Any:
        assert not hasattr(forward.__self__, "_diffusers_hook")
        found.append(type(forward.__self__).__name__)
        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    workload = workload_of("wan")
    workload.steps = 8  # some of them between timesteps 100 and 800
    prepare(name, workload)
    assert compiled in found


def test_a_model_without_caches_in_diffusers_is_named() -> None:
    with pytest.raises(DoesNotFit, match="DiTTransformer2DModel has no enable_cache"):
        prepare("pab", workload_of("dit"))


def test_a_hook_that_finds_nothing_to_save_is_named_with_its_setting() -> None:
    with pytest.raises(DoesNotFit, match=r"no step takes fewer operations \(every 5th step\)"):
        prepare("taylorseer", workload_of("wan"))


def test_whatever_a_library_raises_is_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Contestant:
        raise TypeError("not my model\nand much more")

    monkeypatch.setitem(rivals.RIVALS, "pab", broken)
    with pytest.raises(DoesNotFit, match=r"^TypeError: not my model$"):
        prepare("pab", workload_of("dit"))


def test_cache_dit_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(DoesNotFit, match="cache-dit is not installed"):
        prepare("cache-dit", workload_of("dit"))


def test_cache_dit_is_enabled_around_compiled_blocks_and_begins_anew(
    monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    """A stand-in with the functions of cache-dit that are called: it skips the second block at odd steps."""
    refreshed = []

    def enable_cache(module: Any, cache_config: Any) -> None:
        step, second = iter(range(100)), module.transformer_blocks[1].forward
        module.transformer_blocks[1].forward = lambda x, **k: x if next(step) % 2 else second(x, **k)

    made: Any = types.ModuleType("cache_dit")
    made.DBCacheConfig, made.enable_cache = lambda **options: options, enable_cache
    made.refresh_context = lambda module, cache_config: refreshed.append(cache_config["num_inference_steps"])
    monkeypatch.setitem(sys.modules, "cache_dit", made)
    monkeypatch.setattr(rivals, "THRESHOLDS", (0.1,))
    workload = workload_of("dit")
    chosen = prepare("cache-dit", workload)
    assert [share < 1 for share in shares(chosen)] == [False, True, False, True]
    refreshed.clear()
    warm_up(chosen, workload)
    assert refreshed == [STEPS]


def test_a_forward_is_compiled_once_per_class_and_apart_from_other_contestants(uncompiled: None) -> None:
    workload = workload_of("dit")
    modules = [workload.copy(), workload.copy()]
    for module in modules:
        rivals._compile(rivals._blocks_of, "eager", module)
    first, second = ([block.forward.__func__.__code__ for block in module.transformer_blocks] for module in modules)
    assert first[0] is first[1]
    assert second[0] is second[1]
    original = type(workload.module.transformer_blocks[0]).forward.__code__
    assert len({id(code) for code in (first[0], second[0], original)}) == 3
    outputs: list[torch.Tensor] = []
    for model in (workload.module, *modules):
        list(workload.calls(lambda model=model, **inputs: outputs.append(model(**inputs)[0]), 1))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_repeated_blocks_are_compiled_where_the_class_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    prepare("compile-blocks", workload_of("dit"))
    prepare("compile-blocks", workload_of("flux"))
    assert compiled == ["BasicTransformerBlock"] * 2 + ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
