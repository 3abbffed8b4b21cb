"""``dicompile inspect``: one screen, at any width, for any kind of model."""

from __future__ import annotations

import gc
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.analysis import Analysis, SiteKind
from dicompile.cli.dataflow import block_flow
from dicompile.cli.inspect import facts, site_table
from dicompile.cli.models import Loaded, Shape, load
from dicompile.cli.pictures import draw_blocks
from dicompile.cli.show import candidates, plan_table, refusals
from dicompile.errors import DicompileError
from dicompile.garbage import uncollected
from dicompile.plan import UNLIMITED, TimestepSchedule
from dicompile.policies import POLICIES, required_options
from dicompile.zoo import MODELS
from tests.cli.terminal import check_fits, error_of, run
from tests.plan.toys import toy


@pytest.fixture(scope="module")
def flux() -> Analysis:
    """FLUX.1-dev with two blocks of each kind, and few tokens."""
    model = MODELS["flux.1-dev"]
    size = replace(model.sized((128, 128), text=16), config={"num_layers": 2, "num_single_layers": 2})
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        loaded = Loaded("flux", model.build(size), model.call(size), mode)
    return loaded.analysis()


def printed(*parts: Any, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(*parts, sep="\n")
    return console.file.getvalue()


@pytest.mark.parametrize("columns", [80, 120])
def test_it_is_one_screen(columns: int) -> None:
    text = run("inspect", "demo", columns=columns).output
    check_fits(text, columns)
    assert len(text.splitlines()) <= 60
    for part in (
        "shapes_dit (DiTTransformer2DModel): 2.97 M parameters",
        "8 blocks of 2 kinds, 1 stream of 64 tokens",
        "16 sites: 8 self-attention, 8 mlp",
        "leaves the steps",
        "does not fit: toca-pixart, toca-opensora, ",
    ):
        assert part in text  # fmt: skip
    assert text.count("cross-attention") == 1, "a reason is said once"
    assert re.search(r"need a file that was trained for the model: .*l2c", text)


def test_policies_are_sorted_by_predicted_speedup_and_none_is_left_out(flux: Analysis) -> None:
    names = [name for name in POLICIES if not required_options(name)]
    found = candidates(flux, names, TimestepSchedule.of(50), UNLIMITED)
    speedups = [item.plan.predicted_speedup for item in found.plans]
    assert speedups == sorted(speedups, reverse=True)
    assert sorted([name for item in found.plans for name in item.names] + list(found.refused)) == sorted(names)


def test_names_of_one_plan_are_one_row(flux: Analysis) -> None:
    found = candidates(flux, ["toca", "fora", "toca-flux", "duca-flux", "duca"], TimestepSchedule.of(50), UNLIMITED)
    assert {item.label for item in found.plans} == {"toca = toca-flux", "fora", "duca-flux = duca"}
    assert "toca = toca-flux" in printed(plan_table(found.plans), width=80)


def test_a_reason_is_given_once_for_all_that_share_it(flux: Analysis) -> None:
    found = candidates(flux, ["toca-pixart", "fora", "duca-pixart"], TimestepSchedule.of(50), UNLIMITED)
    ((names, reason),) = refusals(found.refused)
    assert names == "toca-pixart, duca-pixart"
    assert reason == "ranks tokens by entropy, for which there is no cross-attention in the block"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("wide", [False, True])
def test_sites_fit_the_terminal(flux: Analysis, columns: int, wide: bool) -> None:
    structure = flux.structure()
    text = printed(site_table(structure, wide=wide), *facts(structure), width=160 if wide else columns)
    check_fits(text, 160 if wide else columns)
    for line in ("single_transformer_blocks 2-3", "joint-attention", "parallel", "1x80x3072", "(1) aten.scaled_dot_"):
        assert line in text
    assert ("heaviest operator" in text) == wide


def test_what_nobody_registered_is_named() -> None:
    made = toy([("mlp",)])
    strange = replace(made.sites[0], kind=SiteKind.UNKNOWN)
    text = printed(*facts(replace(made, sites=(strange,))), width=120)
    assert "of kind unknown, with an operator that nobody registered: 1 sites" in text


def test_few_runs_of_blocks_are_shown_and_all_on_request() -> None:
    kinds = [("mlp",), ("self-attention", "mlp")] * 5
    short, long = (printed(site_table(toy(kinds), everything=every), width=80) for every in (False, True))
    assert "4 more runs of blocks (--all)" in short
    assert len(long.splitlines()) > len(short.splitlines())
    assert "more runs" not in long


def test_grids_come_on_request_and_json_is_data() -> None:
    text = run("inspect", "demo", "-p", "fora", "--steps", "6", "--grid").output
    assert "0-7 self-attention  F.F..F" in text
    data = json.loads(run("inspect", "demo", "-p", "fora", "-p", "toca-pixart", "--steps", "6", "--json").stdout)
    assert [step["kind"] for step in data["policies"]["fora"]["steps"]] == [
        "full", "reuse", "full", "reuse", "reuse", "full",
    ]  # fmt: skip
    assert data["policies"]["fora"]["steps"][0]["held_bytes"] == data["policies"]["fora"]["cache_bytes"]
    assert list(data["refused"]) == ["toca-pixart"]


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in run("inspect", "demo", "-p", "fora").output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in run("inspect", "demo", "-p", "fora").output


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_well_known_model_needs_no_weights_and_takes_sizes_in_pixels() -> None:
    loaded = load("DiT-XL-2", Shape(batch=4, size="128"))
    assert loaded.name == "DiT-XL/2 (DiTTransformer2DModel)"
    assert loaded.inputs["hidden_states"].shape == (4, 4, 16, 16)
    assert loaded.about == (
        "128x128 pixels, 64 tokens, batch 4",
        "config: facebook/DiT-XL-2-256, transformer/config.json",
    )
    assert loaded.parameters > 6e8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flux.1-def"], "did you mean flux.1-dev"),
        (["black-forest-labs/FLUX.1-dev"], "its config is bundled: flux.1-dev"),
        (["somebody/model"], "--download fetches its config.json, no weights"),
        (["demo", "--size", "512"], "demo takes no --size"),
        (["flux.1-dev", "--latent", "8"], "flux.1-dev takes no --latent"),
        (["flux.1-dev", "--size", "big"], "size cannot be 'big'"),
        (["somewhere:model", "--frames", "9"], "somewhere:model takes no --frames"),
        (["demo", "--graph", "graph.gif"], "cannot draw to graph.gif"),
        (["demo", "-p", "ford"], "no policy is called 'ford'"),
    ],
)
def test_mistakes_are_explained_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    error = error_of(capsys, monkeypatch, "inspect", *arguments)
    assert message in error
    assert "fix:" in error


def test_a_config_is_fetched_if_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_config(name: str, subfolder: str = "") -> dict[str, Any]:
        asked.append((name, subfolder))
        if subfolder:
            raise OSError("there is no such folder")
        return {**MODELS["dit-xl-2"].config(), "num_layers": 1}

    monkeypatch.setattr(diffusers.AutoModel, "load_config", load_config)
    loaded = load("somebody/model", Shape(latent=8), download=True)
    assert asked == [("somebody/model", "transformer"), ("somebody/model", "")]
    assert loaded.inputs["hidden_states"].shape == (2, 4, 8, 8)
    assert loaded.about[-1] == "config: somebody/model on the Hugging Face hub"


def test_a_config_that_cannot_be_fetched_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_config(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(diffusers.AutoModel, "load_config", load_config)
    with pytest.raises(DicompileError, match=r"no config of a/b could be fetched(.|\n)*offline"):
        load("a/b", download=True)


def test_garbage_is_collected_again_whatever_happens() -> None:
    with pytest.raises(DicompileError), uncollected():
        assert not gc.isenabled()
        load("nothing")
    assert gc.isenabled()


# Dataflow -------------------------------------------------------------------------------------------------------------


def test_the_dataflow_of_a_block_has_few_boxes_and_marks_its_sites(flux: Analysis) -> None:
    capture, structure = flux.capture, flux.structure()
    flow = block_flow(capture, structure, structure.blocks[0])
    boxes = [box for _, box in flow.nodes(data="box")]
    assert len(boxes) < len(structure.blocks[0].nodes) / 2
    assert sorted(box.what for box in boxes if box.kind == "add") == ["+ stream 0"] * 2 + ["+ stream 1"] * 2
    by_module = {box.module: box for box in boxes}
    assert by_module["attn.to_q"].what == "linear"
    assert by_module["attn.to_q"].sites == (0,)
    assert by_module["attn"].sites == (0, 2), "both streams read the joint attention"
    assert by_module["ff.net.2"].sites == (1,)
    assert by_module["ff_context.net.2"].sites == (3,)
    assert by_module["norm1.linear"].sites == ()


def test_the_dataflow_is_drawn_with_its_text(flux: Analysis, tmp_path: Path) -> None:
    draw_blocks(tmp_path / "graph.svg", flux.capture, flux.structure())
    svg = (tmp_path / "graph.svg").read_text()
    text = " ".join(ET.fromstring(svg).itertext())
    for part in ("transformer_blocks.0", "single_transformer_blocks.0", "scaled_dot_product_attention", "site 1, mlp"):
        assert part in text
    assert [file.name for file in tmp_path.iterdir()] == ["graph.svg"]
