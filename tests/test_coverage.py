"""Every class of transformer that diffusers exports, and three of other houses, through the whole of dicompile.

The ground truth is the untouched model and what a reader of its source wrote into the zoo; docs/coverage.md is the
table of what comes out. Every fifth class runs always, in one configuration, under FORA; `make nightly` runs all of
them, in all configurations, and DuCa besides.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from dicompile.capture import Role
from dicompile.errors import CannotCapture
from tests.zoo.case import Case
from tests.zoo.coverage import (
    CASES,
    POLICIES,
    STEPS,
    Facts,
    Row,
    class_of,
    expected_branches,
    exported_classes,
    facts_of,
    first_tensor,
    found_branches,
    missing_patterns,
    optimized_for,
    row_of,
    table,
)

DOC = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
POSSIBLE = [case for case in CASES if not case.impossible]
IMPOSSIBLE = [case for case in CASES if case.impossible]
ONE_OF_EACH = list({class_of(case): case for case in reversed(POSSIBLE)}.values())[::-1]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SLOW = {
    "BriaFibo2Transformer2DModel", "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
    "Kandinsky6SRTransformer3DModel", "Lumina2Transformer2DModel", "MochiTransformer3DModel",
    "MotifVideoTransformer3DModel", "NucleusMoEImageTransformer2DModel", "SanaWMTransformer3DModel",
}  # fmt: skip
"""Classes of which one call takes longest: checked at night."""
BY_NIGHT = SLOW | {class_of(case) for i, case in enumerate(ONE_OF_EACH) if i % 5}
"""Of the others every fifth one is checked always; nobody else waits for the rest."""


def cases(those: list[Case], nightly: frozenset[str] | set[str] = frozenset()) -> pytest.MarkDecorator:
    marked = [pytest.param(case, marks=[pytest.mark.nightly] if class_of(case) in nightly else []) for case in those]
    return pytest.mark.parametrize("case", marked, ids=str)


def test_the_zoo_has_every_class_that_diffusers_exports() -> None:
    assert exported_classes() <= {class_of(case) for case in CASES}


def test_the_table_has_a_line_for_every_case_and_its_heading_counts_them() -> None:
    lines = DOC.read_text(encoding="utf-8").splitlines()
    rows = [Row(*line.removeprefix("| ").split(" | ")[:2]) for line in lines if re.match(r"\| \w.* \| \w+ \| \d", line)]
    assert [row.case for row in rows] == sorted(case.name for case in CASES)
    assert lines[:6] == list(table(rows))[:6]


@cases(ONE_OF_EACH, BY_NIGHT)
def test_a_class_works(case: Case) -> None:
    check(case, facts_of(case))


@pytest.mark.nightly
@cases(POSSIBLE)
def test_a_configuration_works_under_every_policy(case: Case) -> None:
    facts = facts_of(case, POLICIES)
    assert tuple(facts.runs) == POLICIES
    check(case, facts)


@pytest.mark.nightly
@cases(POSSIBLE)
def test_a_configuration_gives_the_same_hoisted(case: Case) -> None:
    torch._dynamo.reset()
    model, outputs = case.model(), {}
    with torch.no_grad():
        for hoist in ("off", "conditioning", "all"):
            optimized = optimized_for(case, model, POLICIES[0], hoist=hoist)
            outputs[hoist] = [first_tensor(optimized(**case.at(step))) for step in range(STEPS)]
    assert all(map(torch.equal, outputs["off"], outputs["conditioning"]))
    for exact, rounded in zip(outputs["off"], outputs["all"], strict=True):
        torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def check(case: Case, facts: Facts) -> None:
    paths = list(found_branches(facts.structure))
    assert found_branches(facts.structure) == expected_branches(case, paths)
    assert missing_patterns(case, paths) == []
    check_roles(case, facts)
    check_calls(facts)
    check_runs(facts)
    assert line_of(case.name) == line_of(case.name, "\n".join(table([row_of(case, facts)])))


def check_roles(case: Case, facts: Facts) -> None:
    roles = {item.role: item.name.split(".")[0] for item in facts.structure.inputs}
    assert roles[Role.LATENT] == case.latent
    # Some classes do not look at their timestep in this configuration.
    named = {item.name.split(".")[0] for item in facts.structure.inputs}
    if case.timestep in named and case.timestep != case.latent and Role.TIMESTEP in roles:
        assert roles[Role.TIMESTEP] == case.timestep


def check_calls(facts: Facts) -> None:
    """Attention and linear calls of every block of the untouched model lie in branches that were found there."""
    structure = facts.structure
    for path in {block.path for block in structure.blocks} - {""}:
        called = Counter[str]()
        for (module, name), count in facts.calls.items():
            if module == path or module.startswith(f"{path}."):
                called[name] += count
        blocks = [block for block in structure.blocks if block.path == path]
        attention = {name for block in blocks for site in structure.sites_of(block) for name in site.attention}
        assert not facts.calls or len(attention) == called["attention"], path


def check_runs(facts: Facts) -> None:
    whole = facts.structure.flops
    eager = facts.eager_flops or whole
    assert -0.03 * whole <= eager - whole <= 0.1 * whole  # what nobody reads is not computed any more
    for name, run in facts.runs.items():
        assert run.frames == 1  # no recompilation between steps
        assert run.cold_starts == ()
        assert all(output.isfinite().all() for output in run.outputs)
        for step, (kind, output) in enumerate(zip(run.kinds, run.outputs, strict=True)):
            if kind == "full":
                torch.testing.assert_close(output, facts.eager[step], rtol=1e-3, atol=1e-4)
        # Plans count no scores and no outer products; what spans share (long skips) they count once too often, and what
        # refreshed joint attention needs of the other stream (HunyuanVideo 1.5, ConsisID) too little.
        for step, (done, planned) in enumerate(zip(run.flops, run.planned, strict=True)):
            assert done <= planned + (0.03 if name == "fora" else 0.4) * whole, step
            assert name != "fora" or done >= planned - 0.05 * whole, step
    fora = facts.runs["fora"]
    assert set(fora.kinds) == {"full", "reuse"} and fora.kinds[0] == "full"
    outside = whole - sum(site.flops for site in facts.structure.sites)
    for step, kind in enumerate(fora.kinds):
        if kind == "reuse":
            assert fora.flops[step] <= outside + 0.03 * whole
            assert not torch.equal(fora.outputs[step], facts.eager[step])


@cases(IMPOSSIBLE, {"AnyFlowFARTransformer3DModel"})
def test_a_class_that_cannot_work_is_refused_with_the_operator_that_forbids_it(case: Case) -> None:
    with pytest.raises(CannotCapture) as error:
        facts_of(case)
    assert case.impossible in str(error.value)
    assert line_of(case.name) == line_of(case.name, "\n".join(table([row_of(case, error.value)])))


def line_of(name: str, text: str | None = None) -> str:
    pattern = re.compile(rf"^\| {re.escape(name)} \|.*$", re.MULTILINE)
    found = pattern.search(DOC.read_text(encoding="utf-8") if text is None else text)
    assert found, f"docs/coverage.md has no line for {name}: run `make coverage`"
    # Dynamo of torch 2.11 takes fewer classes whole.
    return found[0].replace("run once", "Dynamo") if torch.__version__ < "2.12" else found[0]
