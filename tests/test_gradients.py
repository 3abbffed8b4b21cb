"""Gradients through an optimized model: never a wrong one; and transforms of functions, in which it takes no part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dicompile
from dicompile.errors import UnsupportedCall
from tests.models import PlainDiT, frames_of, plain_dit, redraw, timesteps

pytestmark = pytest.mark.usefixtures("own_session")

STEPS = 6
T = timesteps(STEPS)
LABELS = torch.tensor([1, 2])
Caller = Callable[[Tensor], Tensor]


def noise() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def time(step: int = 0) -> Tensor:
    return torch.full((2,), float(T[step]))


def optimized(module: nn.Module) -> Any:
    return dicompile.optimize(module, "fora", schedule=T, mode="eager")


def bare(module: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="dicache", options={"policy": "fora", "steps": STEPS, "mode": "eager"})


def guided(model: Any) -> Tensor:
    """The gradient of a loss that the latent reaches past the model, too, as in guidance by posterior sampling."""
    latent = noise().requires_grad_()
    clean = latent - 0.5 * model(latent, time(), LABELS)
    (gradient,) = torch.autograd.grad(clean.square().sum(), latent)
    return gradient


@pytest.mark.parametrize("make", [optimized, bare])
def test_a_gradient_in_which_the_model_would_be_left_out_is_refused(make: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(UnsupportedCall, match="asked for gradients"):
        guided(make(plain_dit(1).model))


def test_gradients_go_through_a_model_that_is_disabled_meanwhile() -> None:
    sample = plain_dit(1)
    model = optimized(sample.model)
    wanted = guided(sample.model)
    dicompile.disable(model)
    assert torch.equal(guided(model), wanted)
    dicompile.enable(model)
    with pytest.raises(UnsupportedCall):
        guided(model)


def test_what_is_learned_before_the_model_and_in_it_gets_no_wrong_gradient() -> None:
    module = plain_dit(1).model
    model, learned = optimized(module), nn.Parameter(torch.zeros(2, 4, 16, 16))
    with pytest.raises(UnsupportedCall):
        model(noise() + learned, time(), LABELS).sum().backward()
    assert learned.grad is None
    module.train()
    with pytest.raises(UnsupportedCall):
        model(noise(), time(), LABELS).sum().backward()


def test_who_does_not_ask_for_gradients_gets_the_same_result_and_may_write_to_it() -> None:
    sample = plain_dit(1)
    model = optimized(sample.model)
    wanted = model(noise(), time(), LABELS)
    assert not wanted.requires_grad
    found = model(noise().requires_grad_(), time(), LABELS)
    assert found.requires_grad and torch.equal(found, wanted)
    found *= 2
    assert torch.equal(found, 2 * wanted)
    assert not model(noise().requires_grad_(), time(), LABELS).detach().requires_grad
    with torch.no_grad():
        assert not model(noise().requires_grad_(), time(), LABELS).requires_grad


def test_a_loop_outside_of_no_grad_follows_its_plan_although_its_latent_wants_gradients() -> None:
    module = plain_dit(1).model
    runs = []
    for wants in (False, True):
        model, latent = optimized(module), noise().requires_grad_(wants)
        for step in range(STEPS):
            latent = latent - 0.1 * model(latent, time(step), LABELS)
        runs.append(latent.detach())
        assert dicompile.report(model).kinds["reuse"] > 0
        assert len(frames_of(model)) == 1
    assert torch.equal(*runs)


class Returns(PlainDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        made = super().forward(x, t, y)
        return {"sample": made, "half": made[:, :2], "labels": y, "name": "x"}


def test_everything_that_a_model_returns_refuses_gradients() -> None:
    found = optimized(redraw(Returns(1)))(noise().requires_grad_(), time(), LABELS)
    assert found["name"] == "x" and not found["labels"].requires_grad
    found["half"].mul_(2)
    for name in ("sample", "half"):
        with pytest.raises(UnsupportedCall):
            found[name].sum().backward()


@dataclass
class Held:
    """An object of no class that pytree knows."""

    value: Tensor


class Holds(PlainDiT):
    def forward(self, x: Held, t: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return Held(super().forward(x.value, t, y))


def test_objects_among_arguments_and_results_are_looked_into() -> None:
    model = optimized(redraw(Holds(1)))
    assert not model(Held(noise()), time(), LABELS).value.requires_grad
    with pytest.raises(UnsupportedCall):
        model(Held(noise().requires_grad_()), time(), LABELS).value.sum().backward()


class Doubles(TorchDispatchMode):
    """Exchanges what an operator computes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.gelu.default else result


def test_a_mode_that_would_see_nothing_of_compiled_code_is_refused_by_name() -> None:
    sample = plain_dit(1)
    arguments = noise(), time(), LABELS
    with torch.no_grad(), Doubles():
        wanted = sample.model(*arguments)
    compiled = dicompile.optimize(copy.copy(sample.model), "none", schedule=timesteps(4))
    with pytest.raises(UnsupportedCall, match="is compiled, and was called within Doubles"), Doubles():
        compiled(*arguments)
    with Doubles():
        torch.testing.assert_close(optimized(sample.model)(*arguments), wanted)


def under_fakes(call: Caller) -> Any:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return call(mode.from_tensor(noise()))


def forward_mode(call: Caller) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return call(torch.autograd.forward_ad.make_dual(noise(), torch.ones(2, 4, 16, 16)))


TRANSFORMS: dict[str, Callable[[Caller], Any]] = {
    "grad": lambda call: torch.func.grad(lambda x: call(x).sum())(noise()),
    "vmap": lambda call: torch.vmap(call)(noise()[None]),
    "jvp": lambda call: torch.func.jvp(call, (noise(),), (noise(),)),
    "forward_ad": forward_mode,
    "torch.jit.trace": lambda call: torch.jit.trace(call, noise(), check_trace=False),
    "ProxyTorchDispatchMode": lambda call: torch.fx.experimental.proxy_tensor.make_fx(call)(noise()),
    "ProxyTorchDispatchMode, before dispatch": lambda call: torch.fx.experimental.proxy_tensor.make_fx(
        call, pre_dispatch=True
    )(noise()),
    "FakeTensorMode": under_fakes,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")  # a DeprecationWarning up to torch 2.13
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_call_that_is_transformed_or_traced_is_refused_by_name_and_changes_nothing(name: str) -> None:
    sample = plain_dit(1)
    model = optimized(sample.model)
    wanted = model(noise(), time(), LABELS)
    with pytest.raises(UnsupportedCall, match=name.split(",", maxsplit=1)[0]):
        TRANSFORMS[name](lambda x: model(x, time(), LABELS))
    assert torch.equal(model(noise(), time(), LABELS), wanted)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo of torch 2.11 asks an optimized part for its length")
def test_an_optimized_part_of_a_model_that_is_captured_is_refused_by_its_name() -> None:
    inner = plain_dit(1).model

    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = optimized(inner)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            found: Tensor = self.inner(x, t, y)
            return found * 2

    module = Around().eval()
    with pytest.raises(UnsupportedCall, match="PlainDiT is optimized, and was called within ProxyTorchDispatchMode"):
        optimized(module)(noise(), time(), LABELS)
    module.inner = dicompile.restore(module.inner)
    found = optimized(module)(noise(), time(), LABELS)
    torch.testing.assert_close(found, inner(noise(), time(), LABELS) * 2)


def test_an_optimized_model_is_not_exported() -> None:
    model = optimized(plain_dit(1).model)
    with pytest.raises(UnsupportedCall, match=r"torch\.export"):
        torch.export.export(model, (noise(), time(), LABELS))
