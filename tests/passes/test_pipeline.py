"""The pipeline: verifies after every pass, leaves out by name, and writes what every stage did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import fx

from dicompile.config import DebugFolder, Settings
from dicompile.errors import IllegalGraph, InvalidSetting
from dicompile.passes import PASSES, PassReport, Segment, SlotRef, Value, rewrite
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.pipeline import PassRun
from dicompile.plan import SlotKind
from tests.models import Sample, optimized, plain_dit, run, timesteps
from tests.passes.segments import FULL, REUSE, mlp_block, rewritten, run_segment

STEPS = 4


def run_pipeline(settings: Settings, debug: DebugFolder | None = None) -> tuple[Segment, tuple[PassRun, ...]]:
    folder = debug or DebugFolder(None)
    live = frozenset({0})
    return rewrite(mlp_block().segment, [REUSE], live, PASSES, settings=settings, debug=folder, name="block0-r")


@dataclass(frozen=True)
class Breaks:
    """A pass with a bug."""

    name: ClassVar[str] = "breaks"
    exact: ClassVar[bool] = True
    how: str = ""

    def run(self, segment: Segment) -> PassReport:
        graph = segment.graph
        gelu = next(node for node in graph.nodes if node.target is torch.ops.aten.gelu.default)
        match self.how:
            case "calls a Python function":
                gelu.target = torch.nn.functional.gelu
            case "calls a method":
                gelu.op, gelu.target = "call_method", "sigmoid"
            case "makes a node without a value":
                with graph.inserting_before(gelu):
                    gelu.replace_input_with(
                        gelu.all_input_nodes[0], graph.call_function(torch.ops.aten.relu.default, (gelu.args[0],))
                    )
            case "adds an output that nobody knows":
                end: fx.Node = graph.output_node()
                end.args = ([*end.args[0], gelu],)
            case "forgets an input":
                segment.inputs.pop()
            case "uses a value before it is made":
                segment.sites[0].add.append(gelu)
        return PassReport(("broke it",))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("calls a Python function", "is not an ATen operator"),
        ("calls a method", "is not an ATen operator"),
        ("makes a node without a value", "relu_default has no value"),
        ("adds an output that nobody knows", "inputs or outputs do not match their references"),
        ("forgets an input", "inputs or outputs do not match their references"),
        ("uses a value before it is made", "used before it has been defined"),
    ],
)
def test_a_pass_that(how: str, text: str) -> None:
    with pytest.raises(IllegalGraph, match=text) as caught:
        rewritten(mlp_block().segment, [FULL], Breaks(how), DropDead())
    assert "after pass breaks" in str(caught.value)


def test_the_passes_run_in_order_and_each_reports() -> None:
    _, runs = run_pipeline(Settings())
    assert [item.name for item in runs] == [
        "score-tokens", "cluster-tokens", "open-spans", "refresh-tokens", "propagate-tokens", "reuse-sites",
        "store-values", "narrow-slots", "rejoin-parts", "drop-dead", "exchange-heads", "share-weights",
        "share-log-sum-exp", "gather-masks", "narrow-linear", "drop-dead", "keep-layout",
    ]  # fmt: skip
    assert [item.name for item in runs if item.report.changed] == ["reuse-sites", "drop-dead"]
    assert all(item.seconds >= 0 for item in runs)


def test_the_segment_that_goes_in_is_not_edited() -> None:
    before = str(mlp_block().segment)
    run_pipeline(Settings())
    assert str(mlp_block().segment) == before


def test_a_pass_is_left_out_by_name() -> None:
    segment, runs = run_pipeline(Settings.from_environment({"DICOMPILE_PASSES": "-drop-dead, -narrow-linear"}))
    assert [item.name for item in runs] == [
        "score-tokens",
        "cluster-tokens",
        "open-spans",
        "refresh-tokens",
        "propagate-tokens",
        "reuse-sites",
        "store-values",
        "narrow-slots",
        "rejoin-parts",
        "exchange-heads",
        "share-weights",
        "share-log-sum-exp",
        "gather-masks",
        "keep-layout",
    ]
    assert "aten.gelu.default" in str(segment)


def test_without_drop_dead_every_bit_stays_the_same() -> None:
    block = mlp_block()
    values = {**block.arguments, SlotRef(0, SlotKind.VALUE): torch.randn_like(block.core())}
    segments = [run_pipeline(Settings(disabled_passes=frozenset(names)))[0] for names in ((), ("drop-dead",))]
    first, second = (run_segment(segment, values)[Value(0)] for segment in segments)
    assert torch.equal(first, second)


def test_a_name_that_no_pass_has_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InvalidSetting) as caught:
        run_pipeline(Settings.from_environment({"DICOMPILE_PASSES": "-drop-dead,-hoist"}))
    assert "DICOMPILE_PASSES leaves out 'hoist', but no pass has this name" in str(caught.value)
    assert (
        "score-tokens, cluster-tokens, open-spans, refresh-tokens, propagate-tokens, reuse-sites, store-values, "
        "narrow-slots, rejoin-parts, drop-dead, exchange-heads, "
        "share-weights, share-log-sum-exp, gather-masks, narrow-linear, keep-layout" in str(caught.value)
    )


def test_an_item_without_a_minus_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="DICOMPILE_PASSES=-drop-dead"):
        Settings.from_environment({"DICOMPILE_PASSES": "drop-dead"})


def test_every_pass_that_changed_something_leaves_a_numbered_file(tmp_path: Path) -> None:
    run_pipeline(Settings(), DebugFolder(tmp_path))
    files = sorted(tmp_path.glob("*.txt"))
    assert [file.name for file in files] == [
        "000-block0-r-captured.txt", "001-block0-r-reuse-sites.txt", "002-block0-r-drop-dead.txt",
    ]  # fmt: skip
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert texts[0] == f"{mlp_block().segment}\n"
    assert texts[1].startswith("# site 0: 1 h1\nvalue0: f32[2,16,8] = input\n")
    assert "gelu" in texts[1]
    assert "gelu" not in texts[2]


@pytest.fixture
def sample() -> Sample:
    return plain_dit(1)


def debug_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.txt"))


def test_the_debug_folder_shows_every_stage_in_reading_order(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMPILE_DEBUG", str(tmp_path / "debug"))
    run(optimized(sample, "fora", STEPS), sample.inputs, timesteps(STEPS))
    names = debug_files(tmp_path / "debug")
    assert [int(name[:3]) for name in names] == list(range(len(names)))
    stages = [name[4:].removesuffix(".txt") for name in names]
    assert stages[:3] == ["captured", "structure", "plan"]
    for variant in ("prologue-plain", "block0-ff", "block0-rr", "epilogue-plain"):
        assert stages.index(f"{variant}-captured") < stages.index(f"{variant}-variant")
    assert "block0-rr-reuse-sites" in stages
    texts = {stage: (tmp_path / "debug" / name).read_text() for stage, name in zip(stages, names, strict=True)}
    assert "aten.scaled_dot_product_attention.default" in texts["captured"]
    assert "@blocks.0.qkv.weight" in texts["captured"]
    assert "self-attention" in texts["structure"]
    assert "0  999.00 full      100.0%  FF" in texts["plan"]
    assert "attention" in texts["block0-rr-captured"]
    assert "attention" not in texts["block0-rr-variant"]


def test_a_second_capture_does_not_write_over_the_first(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMPILE_DEBUG", str(tmp_path))
    model = optimized(sample, "none", STEPS)
    run(model, sample.inputs, timesteps(STEPS)[:1])
    first = {name: (tmp_path / name).read_text() for name in debug_files(tmp_path)}
    run(model, {name: value[:2] for name, value in sample.inputs.items()}, timesteps(STEPS)[:1])
    assert {name: (tmp_path / name).read_text() for name in first} == first
    names = debug_files(tmp_path)
    assert len(names) == 2 * len(first)
    assert [int(name[:3]) for name in names] == list(range(len(names)))


def test_without_a_debug_folder_no_text_is_made(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DICOMPILE_DEBUG", raising=False)

    def refuse(*_: object) -> str:
        raise AssertionError("text was made for nobody")

    monkeypatch.setattr("dicompile.passes.base.graph_text", refuse)
    monkeypatch.setattr("dicompile.capture.normalise.graph_text", refuse)
    run(optimized(sample, "fora", STEPS), sample.inputs, timesteps(STEPS))
