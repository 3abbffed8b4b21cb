"""The models are those that were published, smaller where that is said, and run on what is made for them."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from dicompile.bench.models import SUBJECTS, Subject, get_subjects
from dicompile.bench.workload import Workload
from dicompile.errors import DicompileError

BILLIONS = {"dit": 0.675, "pixart": 0.611, "sd3": 2.03, "flux": 11.9, "wan": 1.42, "cogvideox": 1.69}
"""Parameters as published."""
TOKENS = {"dit": 256, "pixart": 1024, "sd3": 4096, "flux": 4096, "wan": 32760, "cogvideox": 17550}

every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
every_full_one = pytest.mark.parametrize(
    "subject",
    [pytest.param(one, id=name, marks=[pytest.mark.nightly] * (name != "dit")) for name, one in SUBJECTS.items()],
)


def quick(subject: Subject, dtype: torch.dtype = torch.float32, steps: int = 2) -> Workload:
    return Workload.of(subject, subject.size("quick"), steps, "cpu", dtype)


@every_full_one
def test_the_full_size_is_the_published_one_and_its_inputs_fit(subject: Subject) -> None:
    workload = Workload.of(subject, subject.full, 1, "meta", torch.bfloat16)
    module = workload.module
    assert len(list(workload.calls(module, 1))) == 1
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if subject.name == "dit":  # diffusers gives every block embeddings of timestep and class of its own
        parameters -= sum(p.numel() for n, p in module.named_parameters() if ".emb." in n)
        parameters += 1152 * 1001 + 256 * 1152 + 1152 * 1152 + 2 * 1152
    assert parameters / 1e9 == pytest.approx(BILLIONS[subject.name], rel=0.03)
    assert subject.model.tokens(subject.full) == TOKENS[subject.name]


@every_subject
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)])
def test_it_runs_on_the_inputs_made_for_it(subject: Subject, dtype: torch.dtype) -> None:
    workload = quick(subject, dtype)
    outputs = []
    assert all(seconds > 0 for seconds in workload.calls(lambda **k: outputs.append(workload.module(**k)[0]), 2))
    assert all(output.isfinite().all() for output in outputs)
    assert not torch.equal(*outputs)
    channels = {"dit": 2, "pixart": 2}.get(subject.name, 1)  # the variance, too
    assert outputs[0].numel() == channels * workload.ends[0].numel()


def test_the_size_is_stated() -> None:
    flux = SUBJECTS["flux"]
    assert flux.describe(flux.full) == "57 blocks, width 3072, 4096 tokens, 512 of text, batch 1"
    assert flux.describe(flux.reduced) == "12 of 57 blocks, width 384 of 3072, 256 of 4096 tokens, 77 of text, batch 1"


def test_what_diffusers_keeps_in_float32_stays_there() -> None:
    module = quick(SUBJECTS["wan"], torch.bfloat16).module
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.ffn.net.2.weight"] == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_an_unknown_model_is_named_beside_the_known_ones() -> None:
    assert [subject.name for subject in get_subjects([])] == list(SUBJECTS)
    with pytest.raises(DicompileError, match=r"no model 'dlt'(.|\n)*dit, pixart, sd3, flux, wan, cogvideox"):
        get_subjects(["dit", "dlt"])


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DicompileError, match=r"pip install 'dicompile\[diffusers\]'"):
        quick(SUBJECTS["dit"])


def test_quick_is_small() -> None:
    for subject in SUBJECTS.values():
        size = subject.size("quick")
        assert math.prod(size.latent) <= 256
        assert subject.describe(size).startswith("2 of ")
