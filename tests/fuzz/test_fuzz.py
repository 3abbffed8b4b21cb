"""Small models of any kind under policies of any kind: what runs is what a hand-written reference of the plan does."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dicompile
from dicompile.errors import PolicyDoesNotFit
from dicompile.plan import Cadence, Forecast, Policy, Refresh, Reuse, Rule, Table, TokenScore, TokenTable
from dicompile.policies import get_policy
from dicompile.runtime import current_session
from tests.fuzz.nets import BlockKind, Net, NetKind
from tests.fuzz.reference import Reference
from tests.models import state_of, timesteps

STEPS = 6
TIMES = timesteps(STEPS)
SITES = {"self": 2, "cross": 3, "joint": 4, "parallel": 1, "axial": 3, "mlp": 1}
EVERY_THIRD = Cadence(interval=3, counting="up", warmup=2)
OUTCOMES: Counter[str] = Counter()
WORDS_OF_POLICY = re.compile(r"policy '[^']*'")


@st.composite
def kinds(draw: st.DrawFn) -> NetKind:
    frames = draw(st.sampled_from([0, 0, 0, 1, 2]))
    batch = draw(st.integers(1, 4))
    text = draw(st.sampled_from([1, 3, 16]))
    joint = draw(st.integers(0, 2))
    others = draw(st.integers(0 if joint else 1, 3))
    names = ["self", "cross", "parallel", "mlp", *(["axial"] if frames else [])]
    uniform = draw(st.sampled_from([*names, "any"]))
    joins = bool(joint) and draw(st.booleans())
    alike = {
        "is_gated": draw(st.booleans()),
        "part": batch > 1 and draw(st.sampled_from([False, False, True])),
        "registers": draw(st.sampled_from([0, 0, 2])),
    }
    blocks = [BlockKind("joint", **{**alike, "part": False}) for _ in range(joint)]
    for _ in range(others):
        name = uniform if uniform != "any" else draw(st.sampled_from(names))
        blocks.append(BlockKind("self" if joins and name == "axial" else name, **alike))  # type: ignore[arg-type]
    reference = 0 if "axial" in {block.kind for block in blocks} else draw(st.sampled_from([0, 0, 4]))
    return NetKind(
        blocks=tuple(blocks), batch=batch, frames=frames,
        sides=draw(st.sampled_from([(4, 4), (4, 4), (2, 4), (1, 2), (1, 1)])), text=text, reference=reference,
        joins=joins, is_turned=draw(st.booleans()), has_positions=draw(st.booleans()),
    )  # fmt: skip


whats = st.sampled_from(["core", "update"])


def recalls(what: str) -> st.SearchStrategy[Reuse | Forecast]:
    return st.one_of(st.just(Reuse(what=what)), st.builds(Forecast, order=st.integers(0, 2), what=st.just(what)))


BASES = ["attention", "value-norm", "entropy", "norm", "similarity", "random", "key-norm"]
scores = st.builds(
    TokenScore, base=st.sampled_from(BASES),
    age_weight=st.sampled_from([0.0, 0.25]), grid_cell=st.sampled_from([0, 0, 0, 2]), grid_bonus=st.just(0.4),
    share_guidance=st.sampled_from([False, False, True]),
)  # fmt: skip
mixed = st.sampled_from(["reuse", "reuse", "refuse"])


@st.composite
def rules(draw: st.DrawFn) -> Policy:
    """Reuse, forecasts and token refreshes of single branches."""
    recall = recalls(draw(whats))
    refresh = st.builds(
        Refresh, ratio=st.floats(0.1, 0.9), score=scores, context=st.sampled_from(["stored", "all", "kept"]),
        otherwise=recall,
    )  # fmt: skip
    cadence = st.builds(
        Cadence, interval=st.integers(2, 4), counting=st.sampled_from(["down", "up"]), warmup=st.integers(1, 2)
    )
    chosen = [
        Rule(sites=(kind,), do=draw(st.one_of(recall, refresh)))
        for kind in ("mlp", "cross-attention", "parallel", "self-attention")
        if draw(st.booleans())
    ]
    if draw(st.booleans()):
        chosen.append(Rule(sites=("joint-attention",), do=Reuse(what="attention")))
    return Policy(name="rules", cadence=draw(cadence), rules=(*chosen, Rule(do=draw(recall))), where_mixed=draw(mixed))


@st.composite
def spans(draw: st.DrawFn) -> Policy:
    """Whole blocks, or all of them."""
    refresh = st.builds(
        Refresh, ratio=st.floats(0.1, 0.9),
        score=st.builds(TokenScore, base=st.sampled_from(["norm", "random", "similarity"])),
        context=st.sampled_from(["all", "kept"]), otherwise=st.just(Reuse(what="update")),
    )  # fmt: skip
    name = draw(st.sampled_from(["block", "block", "stack"]))
    reuse = st.builds(Reuse, what=st.sampled_from(["update", "stream"]))
    do = draw(st.one_of(reuse, refresh, st.just(Forecast(order=1, what="update"))) if name == "block" else reuse)
    when = draw(st.sampled_from(["always", "odd", "even"]))
    rest = [Rule(do=draw(recalls(draw(whats))))] if draw(st.booleans()) else []
    return Policy(
        name="spans", cadence=Cadence(interval=draw(st.integers(2, 4)), counting="up"),
        rules=(Rule(sites=(name,), when=when, do=do), *rest), where_mixed=draw(mixed),
    )  # fmt: skip


published = st.sampled_from([
    "toca", "duca", get_policy("fora", interval=2), get_policy("taylorseer", interval=3, order=2),
    get_policy("toca", ratio=0.3, score="value-norm"), get_policy("toca-flux", ratio=0.4, interval=3),
    get_policy("toca-pixart", ratio=0.4, share_guidance=False, grid_cell=2), get_policy("duca", ratio=0.3),
    get_policy("duca-flux", ratio=0.4, interval=3), get_policy("duca-pixart", ratio=0.5, aggressive="update"),
    get_policy("duca-opensora"), "toca-opensora",
])  # fmt: skip


@st.composite
def tables(draw: st.DrawFn, kind: NetKind) -> Policy:
    """What to compute at every step, site by site, or how many tokens of every block."""
    random = draw(st.randoms(use_true_random=False))
    if draw(st.booleans()):
        sites = sum(SITES[block.kind] for block in kind.blocks)
        rows = tuple(tuple(not step or random.random() < 0.5 for _ in range(sites)) for step in range(STEPS))
        return Policy(name="table", rules=(Rule(do=Table(compute=rows, otherwise=draw(recalls(draw(whats))))),))
    spans = [count for block in kind.blocks for count in tokens_of_spans(kind, block)]
    counts = tuple(tuple(n if not step else random.randint(0, n) for n in spans) for step in range(STEPS))
    table = TokenTable(
        counts=counts, score=TokenScore(base=draw(st.sampled_from(["norm", "random"])), age_weight=0.0),
        context=draw(st.sampled_from(["all", "kept"])),
    )  # fmt: skip
    return Policy(name="tokens", rules=(Rule(sites=("block",), do=table),), where_mixed=draw(mixed))


programs = kinds().flatmap(lambda kind: st.tuples(st.just(kind), st.one_of(published, rules(), spans(), tables(kind))))


def tokens_of_spans(kind: NetKind, block: BlockKind) -> list[int]:
    """Tokens of the spans of a block, one per stream."""
    picture = kind.tokens + kind.reference
    if block.kind == "joint":
        return [kind.text, picture]
    return [picture + kind.text * kind.joins]


def run_both(kind: NetKind, policy: Policy | str) -> None:
    """Run a model and the reference side by side."""
    model, inputs = Net.of(kind), kind.conditioning()
    current_session().keep_chosen = True
    optimized = dicompile.optimize(model, policy, schedule=TIMES, mode="eager")
    reference: Reference | None = None
    for number, time in enumerate(TIMES):
        latent, timestep = kind.latent(number), torch.full((kind.batch,), float(time))
        try:
            output = optimized(latent, timestep, **inputs)
        except PolicyDoesNotFit as refused:
            assert number == 0, "refused in the middle of a run"
            OUTCOMES[f"refused: {WORDS_OF_POLICY.sub('policy', refused.what)}"] += 1
            return
        plan = dicompile.plan_of(optimized)
        reference = reference or Reference.like(kind, dicompile.structure_of(optimized))
        (context,) = state_of(optimized).contexts.values()
        expected = reference.step(plan, number, context.chosen, latent, timestep)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    OUTCOMES["ran"] += 1


BASE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)


@settings(BASE, max_examples=5, derandomize=True)
@given(programs)
@example(
    (NetKind(), Policy(name="blocks", cadence=EVERY_THIRD, rules=(Rule(sites=("block",), do=Reuse(what="update")),)))
)
@example((NetKind(blocks=(BlockKind(part=True),) * 2, batch=3), "duca"))
@example(
    (NetKind(blocks=(BlockKind("joint", registers=2),) * 2, reference=4), get_policy("toca", ratio=0.5, grid_cell=0))
)
def test_what_runs_is_what_the_plan_says(program: tuple[NetKind, Policy | str]) -> None:
    run_both(*program)


@pytest.mark.nightly
@settings(BASE, max_examples=int(os.environ.get("DICOMPILE_FUZZ", "500")))
@given(programs)
def test_many_of_them(program: tuple[NetKind, Policy | str]) -> None:
    run_both(*program)


@pytest.fixture(autouse=True, scope="module")
def tell() -> Iterator[None]:
    """What became of the programs, for whoever runs pytest with -s."""
    yield
    print("\n".join(["", *(f"{count:5} {outcome}" for outcome, count in OUTCOMES.most_common())]))
