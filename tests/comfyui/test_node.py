"""The custom node of ComfyUI, loaded and run as ComfyUI does, around a stand-in (`standin.py` says of what)."""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.errors import CacheTooLarge, CallOutsideSchedule, UnsupportedModel
from dicompile.runtime import current_session
from dicompile.runtime.contexts import ContextState
from tests.comfyui.nodes import Counted, DiT, Loads
from tests.comfyui.standin import Prompt, WrappersMP, loaded
from tests.models import redraw

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "comfyui"
WORKFLOW = json.loads((Path(__file__).parent / "workflow.json").read_text())
STEPS = WORKFLOW["6"]["inputs"]["steps"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Products of two conditions at once round in another way than those of one at a time."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, Any]]:
    with loaded(FOLDER) as found:
        yield found


@pytest.fixture
def loads() -> Loads:
    with torch.inference_mode():  # as ComfyUI loads models
        return Loads()


def changed(*changes: tuple[str, str, Any], **added: Any) -> dict[str, Any]:
    """The workflow with other inputs: node, name and value; and with further nodes."""
    workflow = copy.deepcopy(WORKFLOW)
    for node, name, value in changes:
        workflow[node]["inputs"][name] = value
    for name, (kind, inputs) in added.items():
        workflow[name] = {"class_type": kind, "inputs": inputs}
    return workflow


UNCACHED = changed(("6", "model", ["1", 0]))
CONSTANT_LORA = ("LoraLoaderModelOnly", {"model": ["2", 0], "strength_model": 0.5})


def latent(outputs: dict[str, Any], name: str = "6") -> Tensor:
    samples: Tensor = outputs[name].args[0]["samples"]
    return samples


def report(outputs: dict[str, Any]) -> str:
    text: str = outputs["7"].args[0]
    assert outputs["7"].ui.value == text
    return text


def fresh(nodes: dict[str, Any], loads: Loads, workflow: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a workflow of which no node ran before."""
    return Prompt({**nodes, **loads.nodes()}).run(workflow)


def held() -> list[ContextState]:
    """Contexts anywhere that hold anything."""
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is ContextState and (one.store or one.latent is not None)]


class Plain(nn.Module):
    """The model with the arguments that matter."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Any:
        return self.module(x, timestep, context, transformer_options={})


def by_hand(model: nn.Module, policy: str, text: tuple[int, int] = (1, 2)) -> Tensor:
    """What the workflow draws, as a loop around an optimized module."""
    sigmas = torch.linspace(1, 0, STEPS + 1)
    optimized = dicompile.optimize(Plain(model), policy, schedule=sigmas[:-1].tolist(), backend="eager")
    positive, negative = (torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(i)) for i in text)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for i in range(STEPS):
            sigma = sigmas[i].repeat(2)
            both = torch.cat([x, x])
            out = both - optimized(both, sigma, torch.cat([negative, positive])) * sigma.view(-1, 1, 1, 1)
            uncond, cond = out.chunk(2)
            denoised = uncond + (cond - uncond) * WORKFLOW["6"]["inputs"]["cfg"]
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def test_a_workflow_draws_what_the_optimized_module_draws(nodes: dict[str, Any], loads: Loads) -> None:
    module = loads.base.diffusion_model
    outputs = fresh(nodes, loads, WORKFLOW)
    assert torch.equal(latent(outputs), by_hand(module, "fora"))
    assert not torch.allclose(latent(outputs), latent(fresh(nodes, loads, UNCACHED)), **CLOSE)
    assert report(outputs).startswith("6 calls: 3 full, 3 reuse; cache 33.00 KiB at most, 0 bytes now")
    assert loads.base.diffusion_model is module


def test_policy_none_draws_what_the_model_draws(nodes: dict[str, Any], loads: Loads) -> None:
    outputs = fresh(nodes, loads, changed(("2", "policy", "none")))
    torch.testing.assert_close(latent(outputs), latent(fresh(nodes, loads, UNCACHED)), **CLOSE)


@pytest.mark.nightly  # a minute of compiling
def test_compiled_it_draws_the_same(nodes: dict[str, Any], loads: Loads) -> None:
    outputs = fresh(nodes, loads, changed(("2", "backend", "inductor")))
    torch.testing.assert_close(latent(outputs), latent(fresh(nodes, loads, WORKFLOW)), rtol=1e-4, atol=1e-4)


def test_another_run_captures_nothing_and_remembers_nothing(nodes: dict[str, Any], loads: Loads) -> None:
    prompt = Prompt({**nodes, **loads.nodes()})
    model = prompt.run(WORKFLOW)["2"].args[0].attachments["dicompile"]
    again = prompt.run(changed(("6", "seed", 4)))
    assert len(model._optimized.frames) == 1
    assert len(model._in_place._read._kinds) == 1
    assert not held()
    assert torch.equal(latent(again), latent(fresh(nodes, loads, changed(("6", "seed", 4)))))


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_is_interrupted_leaves_nothing(nodes: dict[str, Any], loads: Loads, step: int) -> None:
    prompt, module = Prompt({**nodes, **loads.nodes()}), loads.base.diffusion_model

    def interrupt(now: int) -> None:
        if now == step:
            raise InterruptedError

    loads.at_step = interrupt
    with pytest.raises(InterruptedError) as interrupted:
        prompt.run(WORKFLOW)
    assert interrupted.tb is not None
    assert not held()
    assert loads.base.diffusion_model is module
    model = prompt.run({name: WORKFLOW[name] for name in ("1", "2")})["2"].args[0]
    assert model.attachments["dicompile"].report.endswith("0 bytes now")
    loads.at_step = lambda _: None
    assert torch.equal(latent(prompt.run(WORKFLOW)), latent(fresh(nodes, loads, WORKFLOW)))


def test_conditions_may_come_one_at_a_time(nodes: dict[str, Any], loads: Loads) -> None:
    together = latent(fresh(nodes, loads, WORKFLOW))
    names: list[set[str]] = []

    def note(_: int) -> None:
        (state,) = current_session()._states.values()
        names.append(set(state.contexts))

    loads.batches, loads.at_step = False, note
    outputs = fresh(nodes, loads, WORKFLOW)
    conditions = names[0]
    assert {uuid.UUID(name) for name in conditions}
    assert len(conditions) == 2
    assert all(after <= conditions for after in names)
    torch.testing.assert_close(latent(outputs), together, **CLOSE)
    assert report(outputs).startswith("12 calls: 6 full, 6 reuse")
    assert "batch" not in report(outputs)


def test_conditions_in_other_batches_compute_everything_anew(nodes: dict[str, Any], loads: Loads) -> None:
    def other_than_before(step: int) -> None:
        loads.batches = step % 2 == 1

    loads.at_step = other_than_before
    outputs = fresh(nodes, loads, WORKFLOW)
    torch.testing.assert_close(latent(outputs), latent(fresh(nodes, loads, UNCACHED)), **CLOSE)
    assert "reuse" not in report(outputs).partition(";")[0]
    assert "each way of batching remembers for itself" in report(outputs)


def test_conditions_that_part_once_are_cached_again(nodes: dict[str, Any], loads: Loads) -> None:
    def part(step: int) -> None:
        loads.batches = step < 1

    loads.at_step = part
    assert "computed for want of stored values at steps [2, 2]" in report(fresh(nodes, loads, WORKFLOW))
    assert report(fresh(nodes, loads, WORKFLOW)).count("reuse") == 1


def test_two_samplers_of_one_model_with_a_lora_between(nodes: dict[str, Any], loads: Loads) -> None:
    second = {**WORKFLOW["6"]["inputs"], "model": ["8", 0], "latent_image": ["6", 0], "denoise": 0.5}
    workflow = changed(("7", "latent", ["9", 0]), **{"8": CONSTANT_LORA, "9": ("KSampler", second)})
    both = fresh(nodes, loads, workflow)
    assert "6 calls: 3 full, 3 reuse" in report(both)
    assert torch.equal(latent(both), latent(fresh(nodes, loads, WORKFLOW)))

    class Given(nodes["DicompileReport"]):  # type: ignore[misc]
        """The first sampler's latent, without the first sampler."""

        @classmethod
        def execute(cls, **_: Any) -> Any:
            return both["6"]

    alone = {**second, "latent_image": ["6", 0]}
    without = changed(**{"8": CONSTANT_LORA, "9": ("KSampler", alone)})
    del without["7"]
    without["6"] = {"class_type": "Given", "inputs": {"model": ["2", 0], "latent": ["5", 0]}}
    assert torch.equal(latent(both, "9"), latent(fresh({**nodes, "Given": Given}, loads, without), "9"))


def test_a_run_within_a_run_is_another_one(nodes: dict[str, Any], loads: Loads) -> None:
    prompt, inner = Prompt({**nodes, **loads.nodes()}), []

    def sample_again(step: int) -> None:
        if step == 2 and not inner:  # the next step reuses what this one stored
            inner.append(None)
            inner.append(prompt.run(changed(("6", "seed", 4), ("6", "steps", 4))))

    loads.at_step = sample_again
    outer = prompt.run(WORKFLOW)
    loads.at_step = lambda _: None
    assert torch.equal(latent(outer), latent(fresh(nodes, loads, WORKFLOW)))
    assert torch.equal(latent(inner[1]), latent(fresh(nodes, loads, changed(("6", "seed", 4), ("6", "steps", 4)))))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_lora_counts_from_the_run_it_is_in(nodes: dict[str, Any], loads: Loads, strength: float) -> None:
    """The runs before had other weights; what they stored, and what was compiled for them, is no matter."""
    lora = ("LoraLoaderModelOnly", {"model": ["1", 0], "strength_model": strength})
    cached = changed(("2", "model", ["8", 0]), ("2", "policy", "none"), **{"8": lora})
    prompt = Prompt({**nodes, **loads.nodes()})
    for other in (0.25, strength):
        workflow = copy.deepcopy(cached)
        workflow["8"]["inputs"]["strength_model"] = other
        outputs = prompt.run(workflow)
    uncached = changed(("6", "model", ["8", 0]), **{"8": lora})
    torch.testing.assert_close(latent(outputs), latent(fresh(nodes, Loads(), uncached)), **CLOSE)


def test_a_clone_with_a_lora_goes_through_the_same_node(nodes: dict[str, Any], loads: Loads) -> None:
    workflow = changed(("6", "model", ["8", 0]), ("7", "model", ["8", 0]), **{"8": CONSTANT_LORA})
    outputs = fresh(nodes, loads, workflow)
    assert not torch.allclose(latent(outputs), latent(fresh(nodes, Loads(), WORKFLOW)), **CLOSE)
    assert report(outputs).startswith("6 calls: 3 full, 3 reuse")


@pytest.mark.parametrize(("denoise", "multiplier"), [(0.5, 1.0), (1.0, 1000.0), (0.3, 1000.0)])
def test_schedules_are_those_of_the_sampler(nodes: dict[str, Any], denoise: float, multiplier: float) -> None:
    loads = Loads(multiplier=multiplier)
    prompt = Prompt({**nodes, **loads.nodes()})
    model = prompt.run(changed(("6", "steps", 4)))["2"].args[0].attachments["dicompile"]
    told: list[tuple[int, Tensor]] = []
    loads.at_step = lambda step: told.append((model._sigmas.step_index, model._sigmas.timesteps))
    outputs = prompt.run(changed(("6", "denoise", denoise)))
    assert [step for step, _ in told] == list(range(STEPS))
    whole = torch.linspace(multiplier, 0, round(STEPS / denoise) + 1)
    torch.testing.assert_close(told[-1][1], whole[-STEPS - 1 : -1])
    assert report(outputs).startswith("6 calls: 3 full, 3 reuse")
    assert "began" not in report(outputs)
    assert "want" not in report(outputs)


def test_whoever_compiles_last_compiles_alone(nodes: dict[str, Any], loads: Loads) -> None:
    Counted.calls = 0
    before = changed(("2", "model", ["8", 0]), **{"8": ("TorchCompileModel", {"model": ["1", 0]})})
    assert report(fresh(nodes, loads, before)).startswith("6 calls: 3 full, 3 reuse")
    assert Counted.calls == 0
    after = changed(("6", "model", ["8", 0]), **{"8": ("TorchCompileModel", {"model": ["2", 0]})})
    outputs = fresh(nodes, loads, after)
    assert report(outputs).startswith("0 calls: a node after")
    assert Counted.calls == STEPS
    torch.testing.assert_close(latent(outputs), latent(fresh(nodes, loads, UNCACHED)), **CLOSE)
    second = ("Dicompile", {**WORKFLOW["2"]["inputs"], "model": ["2", 0], "policy": "none"})
    twice = changed(("6", "model", ["8", 0]), ("7", "model", ["8", 0]), **{"8": second})
    outputs = fresh(nodes, loads, twice)
    assert all(len(group) == 1 for kind in outputs["8"].args[0].wrappers.values() for group in kind.values())
    assert report(outputs) == "6 calls, compiled; nothing is cached"


def test_models_of_two_classes_are_two_models(nodes: dict[str, Any], loads: Loads) -> None:
    class Twice(DiT):
        def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super()._forward(*args, **kwargs)

    others = [Loads(), Loads()]
    redraw(others[0].base.diffusion_model, 5)
    others[1].base.diffusion_model = redraw(Twice())
    Prompt({**nodes, **loads.nodes()}).run(WORKFLOW)
    shared = [latent(Prompt({**nodes, **other.nodes()}).run(WORKFLOW)) for other in others]
    dicompile.reset()
    for found, other in zip(shared, others, strict=True):
        assert torch.equal(found, latent(fresh(nodes, other, WORKFLOW)))


def test_a_sampler_with_calls_between_the_sigmas_is_refused(nodes: dict[str, Any], loads: Loads) -> None:
    with pytest.raises(CallOutsideSchedule, match=r"(?s)sigma 0\.916667, which is not one of its 6.*such as euler"):
        fresh(nodes, loads, changed(("6", "sampler_name", "dpm_2")))
    compiled = changed(("6", "sampler_name", "dpm_2"), ("2", "policy", "none"))
    uncached = changed(("6", "sampler_name", "dpm_2"), ("6", "model", ["1", 0]))
    torch.testing.assert_close(latent(fresh(nodes, loads, compiled)), latent(fresh(nodes, loads, uncached)), **CLOSE)


def test_a_sampler_that_comes_back_to_a_sigma_is_computed_there(nodes: dict[str, Any], loads: Loads) -> None:
    outputs = fresh(nodes, loads, changed(("6", "sampler_name", "heun")))
    assert "computed for want of stored values" in report(outputs)
    assert sum(map(int, re.findall(r"(\d+) (?:full|reuse)", report(outputs)))) == 2 * STEPS - 1
    uncached = fresh(nodes, loads, changed(("6", "sampler_name", "heun"), ("6", "model", ["1", 0])))
    torch.testing.assert_close(latent(outputs), latent(uncached), rtol=1e-2, atol=1e-2)


def test_a_budget_is_kept_or_refused(nodes: dict[str, Any], loads: Loads) -> None:
    small = changed(("2", "max_cache_gib", 20 / 2**20))
    with pytest.raises(CacheTooLarge):
        fresh(nodes, loads, small)
    small["2"]["inputs"]["over_budget"] = "degrade"
    peak = re.search(r"cache ([\d.]+) KiB at most", report(fresh(nodes, loads, small)))
    assert peak is not None
    assert 0 < float(peak[1]) <= 20


OPTIONS = {
    "['patches']['post_input'][0]": {"patches": {"post_input": [lambda image: image]}},
    "['optimized_attention_override']": {"optimized_attention_override": lambda f, *args: f(*args)},
    "['wrappers']['diffusion_model']['other'][0]": {},
}


@pytest.mark.parametrize("path", OPTIONS)
def test_python_of_other_nodes_inside_the_model_is_refused(nodes: dict[str, Any], loads: Loads, path: str) -> None:
    prompt = Prompt({**nodes, **loads.nodes()})
    model = prompt.run({"1": WORKFLOW["1"]})["1"].args[0]
    model.model_options["transformer_options"].update(OPTIONS[path])
    if not OPTIONS[path]:
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *args: executor(*args))
    with pytest.raises(UnsupportedModel) as refused:
        prompt.run(WORKFLOW)
    assert f"transformer_options{path}, which is a function" in str(refused.value)


def test_another_model_in_its_place_is_refused(nodes: dict[str, Any], loads: Loads) -> None:
    prompt = Prompt({**nodes, **loads.nodes()})
    prompt.run({name: WORKFLOW[name] for name in ("1", "2")})
    loads.base.diffusion_model = redraw(DiT())
    with pytest.raises(UnsupportedModel, match="not the one that dicompile was given"):
        prompt.run(WORKFLOW)


def test_a_call_outside_of_a_sampler_is_as_ever(
    nodes: dict[str, Any], loads: Loads, caplog: pytest.LogCaptureFixture
) -> None:
    model = Prompt({**nodes, **loads.nodes()}).run(WORKFLOW)["2"].args[0]
    x, t, context = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 6, 24)
    with torch.inference_mode():
        found, expected = (
            loads.base.apply_model(x, t, c_crossattn=context, transformer_options={"wrappers": wrappers})
            for wrappers in (model.wrappers, {})
        )
    assert torch.equal(found, expected)
    assert "outside of a sampler" in caplog.text


def test_the_policies_are_those_that_need_no_file(nodes: dict[str, Any]) -> None:
    options = next(one.options for one in nodes["Dicompile"].define_schema().inputs if one.id == "policy")
    assert {"none", "fora", "toca-flux", "taylorseer"} <= set(options)
    assert not {"l2c", "tokencache"} & set(options)


@pytest.fixture
def options(nodes: dict[str, Any]) -> Any:
    return sys.modules[nodes["Dicompile"].__module__.removesuffix("nodes") + "options"]


class Asks(nn.Module):
    """Looks up options in a way of its own."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        self.how(transformer_options)
        return x


GIVEN = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": [4], "g": {}}
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "item": (lambda o: o["a"], {"a": 1}),
    "get": (lambda o: (o.get("a"), o.get("z")), {"a": 1}),
    "in": (lambda o: "f" in o, {"f": [4]}),
    "nested": (lambda o: o["b"]["d"].get("e"), {"b": {"d": {"e": 3}}}),
    "opened, not read": (lambda o: o.get("b", {}).get("z"), {"b": {}}),
    "its own": (lambda o: (o.__setitem__("a", 5), o["a"]), {}),
    "default": (lambda o: (o.setdefault("a", 5), o.setdefault("y", 5), o["y"]), {"a": 1}),
    "taken": (lambda o: o.pop("a"), {"a": 1}),
    "copy": (lambda o: o.copy()["b"].copy()["c"], {"b": {"c": 2}}),
    "truth": (lambda o: bool(o["g"]), {"g": {}}),
    "whole": (lambda o: {**o["b"]}, {"b": GIVEN["b"]}),
    "every": (lambda o: list(o["b"].values()), {"b": GIVEN["b"]}),
    "dict": (dict, GIVEN),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_looked_up_is_kept_and_nothing_else(options: Any, way: str) -> None:
    how, expected = WAYS[way]
    given = copy.deepcopy(GIVEN)
    read = options.ReadOptions(Asks(how))
    assert read.of((torch.ones(1),), {}, given) == expected
    assert given == GIVEN


def test_what_an_option_leads_to_is_looked_for_anew(options: Any) -> None:
    """Another value of an option, or another shape, may lead to others."""
    asked: list[Any] = []
    read = options.ReadOptions(Asks(lambda o: asked.append(o.get("b") if o.get("a") else None)))
    x = torch.ones(1)
    assert read.of((x,), {}, {"a": 0, "b": 7, "c": 8}) == {"a": 0}
    assert read.of((x,), {}, {"a": 1, "b": 7, "c": 8}) == {"a": 1, "b": 7}
    assert len(asked) == 2
    assert read.of((x + 1,), {}, {"a": 1, "b": 7, "c": 9}) == {"a": 1, "b": 7}
    assert len(asked) == 2
    read.of((torch.ones(2),), {}, {"a": 1, "b": 7})
    assert len(asked) == 3
