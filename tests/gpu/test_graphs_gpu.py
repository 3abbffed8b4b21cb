"""On a GPU: steps that run as CUDA graphs give the bits of the same code called kernel by kernel, and nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.policies import ToCa
from tests.gpu.test_variants_gpu import DEVICE, MARKS, STEPS, latents, model_and_inputs, scheduler, waiting_is_an_error
from tests.models import state_of

pytestmark = MARKS

METHODS = ["none", "fora", "toca", "taylorseer", "duca", ToCa(ratio=0.2, score="random")]
GENERATIONS = 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with dicompile.session():
        yield


class Sampling:
    """A model on the GPU, with latents that do not depend on what it returns."""

    def __init__(self, policy: Any, mode: str | None = "reduce-overhead") -> None:
        torch.manual_seed(0)
        self.original, self.inputs = model_and_inputs(torch.float32)
        self.scheduler, self.latents = scheduler(), latents(torch.float32)
        self.model = dicompile.optimize(self.original, policy, schedule=self.scheduler, compile_mode=mode)

    def step(self, number: int, *, other: bool = False) -> Tensor:
        labels = self.inputs["class_labels"]
        changed = {
            "hidden_states": self.latents[number] * (-1 if other else 1),
            "timestep": self.scheduler.timesteps[number].expand(4),
            "class_labels": labels.flip(0) if other else labels,
        }
        output: Tensor = self.model(**self.inputs | changed)[0]
        return output

    def run(self, **other: bool) -> list[Tensor]:
        return [self.step(number, **other) for number in range(STEPS)]

    def guided(self) -> list[Tensor]:
        outputs = []
        for number in range(STEPS):
            for name in ("cond", "uncond"):
                with dicompile.cache_context(name):
                    outputs.append(self.step(number, other=name == "uncond"))
        return outputs


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("policy", METHODS, ids=str)
def test_graphs_give_the_same_bits(policy: Any) -> None:
    wanted, recorded = Sampling(policy, None).run(), Sampling(policy)
    for _ in range(GENERATIONS):
        assert same(recorded.run(), wanted)
    report = dicompile.report(recorded.model)
    assert (report.recorded, report.replayed) == (0, STEPS)


@pytest.mark.parametrize("policy", ["fora", "toca", "taylorseer"])
def test_guidance_partners_have_graphs_of_their_own(policy: str) -> None:
    wanted, recorded = Sampling(policy, None).guided(), Sampling(policy)
    for _ in range(GENERATIONS):
        assert same(recorded.guided(), wanted)
    assert dicompile.report(recorded.model).replayed == 2 * STEPS


def test_two_sessions_take_turns() -> None:
    plain, recorded = Sampling("toca", None), Sampling("toca")
    wanted = plain.run(), plain.run(other=True)
    for _ in range(GENERATIONS):
        sessions = dicompile.session(), dicompile.session()
        with sessions[0] as first, sessions[1] as second:
            pass
        outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number in range(STEPS):
            for other, session in enumerate((first, second)):
                with dicompile.session(session):
                    outputs[other].append(recorded.step(number, other=bool(other)))
        assert same(outputs[0], wanted[0])
        assert same(outputs[1], wanted[1])


def test_threads_with_streams_of_their_own() -> None:
    plain, recorded = Sampling("toca", None), Sampling("toca")
    wanted = plain.run(), plain.run(other=True)
    recorded.run()
    torch.cuda.synchronize()
    found: dict[bool, bool] = {}

    def sample(other: bool) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[other] = all(same(recorded.run(other=other), wanted[other]) for _ in range(GENERATIONS))

    threads = [threading.Thread(target=sample, args=(other,)) for other in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {False: True, True: True}


def test_replaced_and_rewritten_weights_count_at_once() -> None:
    def outputs(sampling: Sampling) -> list[Tensor]:
        weight = sampling.original.transformer_blocks[0].ff.net[2].weight
        result = sampling.run()
        with torch.no_grad():
            weight.mul_(2)
        result += sampling.run()
        weight.data = weight.detach() / 2
        return result + sampling.run()

    plain, recorded = Sampling("fora", None), Sampling("fora")
    for _ in range(GENERATIONS):
        assert same(outputs(recorded), outputs(plain))


def test_replays_never_wait_for_the_device() -> None:
    recorded = Sampling("toca")
    for _ in range(3):
        recorded.run()
    with waiting_is_an_error():
        recorded.run()
    assert dicompile.report(recorded.model).replayed == STEPS


def test_slots_never_move_and_free_gives_all_memory_back() -> None:
    recorded, places = Sampling("taylorseer"), dict[int, int]()
    Sampling("taylorseer", None).run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for number in range(STEPS):
            recorded.step(number)
            for context in state_of(recorded.model).contexts.values():
                for slot, tensor in enumerate(context.store):
                    if tensor is not None:
                        assert places.setdefault(slot, tensor.data_ptr()) == tensor.data_ptr()
    assert places
    report = dicompile.report(recorded.model)
    assert report.graph_bytes > dicompile.plan_of(recorded.model).cache_bytes
    dicompile.free(recorded.model)
    del tensor, context
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20  # cached weights of forecasts, and the like


def test_host_memory_is_refused_on_a_gpu() -> None:
    recorded = Sampling("fora")
    inputs = recorded.inputs | {"timestep": torch.full((4,), 500)}
    with pytest.raises(dicompile.errors.InvalidSetting, match="lies on cpu"):
        recorded.model(**inputs)
    assert recorded.latents[0].device.type == DEVICE
