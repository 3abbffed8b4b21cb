"""``dicompile router`` and ``dicompile train-router``, from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from dicompile.cli.main import app
from dicompile.errors import DicompileError, InvalidRouter, InvalidTrainingData
from dicompile.learn.latents import Latents
from dicompile.policies import Router, RouterFacts, load_router, save_router, schedule_from_json
from tests.models import PlainDiT, redraw

SITES = ("0.self-attention", "0.mlp")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    logits = torch.tensor([[-3.0, 0.0], [9.0, 9.0], [-3.0, -3.0], [9.0, 9.0]])
    facts = RouterFacts(sites=SITES, timesteps=(999.0, 749.0, 499.0, 249.0))
    save_router(Router(logits, facts=facts), tmp_path / "r.safetensors")
    return tmp_path / "r.safetensors"


def test_show_prints_one_row_per_cache_step(file: Path) -> None:
    text = run("router", "show", file).stdout
    assert "3 of 4 sites of 2 cache steps are cached (75.00%)" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [["1", "749", "2", "2", "1", "1"], ["3", "249", "0", "1", "1", "0"]]
    assert "4 of 4 sites" in run("router", "show", file, "--threshold", 0.9).stdout


def test_export_writes_a_schedule(file: Path, tmp_path: Path) -> None:
    result = run("router", "export", file, "--json", tmp_path / "s.json")
    assert "3 of 4 sites" in result.stdout
    compute, sites = schedule_from_json((tmp_path / "s.json").read_text())
    assert sites == SITES
    assert torch.equal(compute, load_router(file).schedule())


def test_a_published_router_can_be_shown_and_exported(shared: Path, tmp_path: Path) -> None:
    published = shared / "routers" / "DiT_DDIM50_router.pt"
    assert "664 of 1400" in run("router", "show", published).stdout
    run("router", "export", published, "--json", tmp_path / "50-N-2-l2c.json")
    assert len(json.loads((tmp_path / "50-N-2-l2c.json").read_text())) == 56


def test_a_file_that_is_no_router_is_an_error_of_ours(tmp_path: Path) -> None:
    assert isinstance(run("router", "show", tmp_path / "gone.pt").exception, InvalidRouter)


# Training -------------------------------------------------------------------------------------------------------------

SHORT = ("--steps", 4, "--iterations", 3, "--batch", 2, "--every", 2)


@pytest.mark.nightly
def test_the_demo_trains_resumes_and_writes_its_files(tmp_path: Path) -> None:
    out = tmp_path / "r.safetensors"
    result = run("train-router", "demo", "--out", out, *SHORT, "--lambda", 1e-5, "--straight-through", 0.5)
    assert result.exit_code == 0, result.output
    router = load_router(out)
    assert (router.steps, router.sites, router.facts.iterations, router.facts.penalty) == (4, 16, 3, 1e-5)
    assert router.facts.timesteps == (999.0, 749.0, 499.0, 249.0)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3
    again = run("train-router", "demo", "--out", out, *SHORT, "--lambda", 1e-5, "--straight-through", 0.5, "--resume")
    assert again.exit_code == 0, again.output
    assert torch.equal(load_router(out).logits, router.logits)
    other = run("train-router", "demo", "--out", out, *SHORT, "--lambda", 1e-4, "--resume")
    assert isinstance(other.exception, InvalidRouter)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder as a pipeline saves it."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    redraw(model).save_pretrained(tmp_path / "pipe" / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "pipe" / "scheduler")
    return tmp_path / "pipe"


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    tensors = {"latents": torch.randn(6, 4, 8, 8), "class_labels": torch.arange(6)}
    save_file({**tensors, "null.class_labels": torch.tensor(10)}, tmp_path / "latents.safetensors")
    return tmp_path / "latents.safetensors"


@pytest.mark.parametrize("grid", ["ddim", "dpm-solver-2"])
def test_a_saved_pipeline_trains_on_a_file_of_latents(pipeline: Path, latents: Path, grid: str, tmp_path: Path) -> None:
    out = tmp_path / "r.safetensors"
    result = run("train-router", pipeline, "--data", latents, "--out", out, *SHORT, "--grid", grid, "--guidance", 2)
    assert result.exit_code == 0, result.output
    router = load_router(out)
    assert (router.grid, router.facts.model, router.sites) == (grid, "DiTTransformer2DModel", 4)
    assert (router.facts.sampler, router.facts.batch) == ("FlowMatchEulerDiscreteScheduler", 4)
    expected = {"ddim": (0.1, 1e-6), "dpm-solver-2": (0.9, 0.1)}[grid]
    assert (router.threshold, router.facts.penalty) == expected


def test_several_penalties_make_a_router_each(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.safetensors"
    result = run(
        "train-router", pipeline, "--data", latents, "--out", out, *SHORT, "--lambda", 0, "--lambda", 1e3, "--lr", 9
    )
    assert result.exit_code == 0, result.output
    few, many = (load_router(tmp_path / f"r-{penalty}.safetensors") for penalty in ("0", "1000"))
    assert (few.facts.penalty, many.facts.penalty) == (0, 1e3)
    assert sum(many.cached().values()) > sum(few.cached().values())
    assert "r-1000.safetensors" in result.stdout


def factory() -> tuple[Any, dict[str, Any], Any]:
    model = redraw(PlainDiT(layers=1, width=16, size=8))
    inputs = {"x": torch.zeros(2, 4, 8, 8), "t": torch.zeros(2, dtype=torch.long), "y": torch.tensor([1, 2])}
    return model, inputs, DDIMScheduler(clip_sample=False)


def nothing() -> None:
    return None


def test_a_factory_trains(tmp_path: Path) -> None:
    save_file({"latents": torch.randn(6, 4, 8, 8), "y": torch.arange(6)}, tmp_path / "l.safetensors")
    out = tmp_path / "r.safetensors"
    spelled = f"{__name__}:factory" if __name__.startswith("tests.") else "tests.cli.test_router:factory"
    result = run("train-router", spelled, "--data", tmp_path / "l.safetensors", "--out", out, *SHORT)
    assert result.exit_code == 0, result.output
    assert load_router(out).facts.model == "PlainDiT"


@pytest.mark.parametrize(
    ("model", "data", "what"),
    [
        ("gone", False, "there is no model 'gone'"),
        ("tests.cli.test_router:gone", True, "cannot find tests.cli.test_router:gone"),
        ("tests.cli.test_router:nothing", True, "tests.cli.test_router:nothing returned NoneType"),
        ("tests.cli.test_router:factory", False, "there is nothing to train tests.cli.test_router:factory on"),
    ],
)
def test_what_cannot_be_trained_says_why(model: str, data: bool, what: str, latents: Path, tmp_path: Path) -> None:
    extra = ("--data", latents) if data else ()
    result = run("train-router", model, "--out", tmp_path / "r.safetensors", *SHORT, *extra)
    assert isinstance(result.exception, DicompileError)
    assert result.exception.what == what


def test_a_folder_without_scheduler_says_so(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    result = run("train-router", pipeline / "transformer", "--data", latents, "--out", tmp_path / "r.safetensors")
    assert isinstance(result.exception, DicompileError)
    assert result.exception.what.endswith("holds no scheduler")


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"x": torch.zeros(2, 4)}, "it holds x"),
        ({"latents": torch.zeros(2, 4), "y": torch.zeros(3)}, "2 latents, but 3 rows of y"),
        ({"latents": torch.zeros(2, 4), "null.y": torch.zeros(1)}, r"null\.y replaces nothing"),
    ],
)
def test_latents_that_do_not_go_together_say_why(tensors: dict[str, Any], why: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(InvalidTrainingData, match=why):
        Latents.load(tmp_path / "l.safetensors")
    with pytest.raises(InvalidTrainingData, match=r"gone\.safetensors"):
        Latents.load(tmp_path / "gone.safetensors")
