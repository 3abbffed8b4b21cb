"""What dicompile makes of every class of the zoo: facts of one run each, and the table of docs/coverage.md.

``python -m tests.zoo.coverage`` prints the table.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import dicompile
from dicompile.analysis import ModelStructure, SiteKind, TokenWise
from dicompile.errors import CannotCapture
from dicompile.wrapper import record_of
from tests.zoo import films, images
from tests.zoo.case import Case

CASES: tuple[Case, ...] = images.CASES + films.CASES
POLICIES = ("fora", "duca")
STEPS = 6
SHORT = {
    SiteKind.SELF_ATTENTION: "self", SiteKind.CROSS_ATTENTION: "cross", SiteKind.JOINT_ATTENTION: "joint",
    SiteKind.MLP: "mlp", SiteKind.PARALLEL: "parallel",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Six steps of one model under one policy.

    Attributes:
        outputs: first result of every step.
        flops: operations that were really carried out at every step.
        planned: operations that the plan says.
        kinds: what every step does.
        frames: graphs that were captured.
        cold_starts: steps that found nothing stored.
    """

    outputs: tuple[Tensor, ...]
    flops: tuple[int, ...]
    planned: tuple[int, ...]
    kinds: tuple[str, ...]
    frames: int
    cold_starts: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """What one class is and does.

    Attributes:
        structure: what analysis finds.
        is_traced: Dynamo could not take it whole, so it was captured by running it.
        eager: first result of every step of the untouched model.
        eager_flops: its operations at a step; 0 where they cannot be counted.
        calls: attention and linear calls of the untouched model, by the path of the module that makes them; empty where
            they cannot be counted.
        runs: by policy.
    """

    structure: ModelStructure
    is_traced: bool
    eager: tuple[Tensor, ...]
    eager_flops: int
    calls: Mapping[tuple[str, str], int]
    runs: Mapping[str, Run]


@functools.lru_cache(maxsize=2)
def facts_of(case: Case, policies: tuple[str, ...] = POLICIES[:1]) -> Facts:
    """Run a class through everything, once; each policy captures it anew.

    Raises:
        CannotCapture: no graph can serve it.
    """
    torch._dynamo.reset()
    model = case.model()
    with torch.no_grad():
        first, flops = _counted(model, case.at(0))
        outputs = (first, *(first_tensor(model(**case.at(step))) for step in range(1, STEPS)))
        calls = eager_calls(model, case.at(0)) if flops else {}
    runs, structure, traced = {}, None, False
    for policy in policies:
        optimized = optimized_for(case, model, policy)
        runs[policy] = _run(optimized, case)
        structure, traced = dicompile.structure_of(optimized), record_of(optimized).calls.is_run
    assert structure is not None
    return Facts(structure, traced, outputs, flops, calls, runs)


def optimized_for(case: Case, model: nn.Module, policy: str, **options: Any) -> Any:
    """A model of a case, optimized for its first steps."""
    timestep = "none" if case.timestep == case.latent else None  # a part of a model, which is given none
    schedule = list(case.timesteps[:STEPS])
    return dicompile.optimize(model, policy, schedule=schedule, mode="eager", timestep=timestep, **options)


def _run(optimized: Any, case: Case) -> Run:
    for step in range(STEPS):
        optimized(**case.at(step))
    done = []  # the second generation compiles nothing, so that only its own operations are counted
    for step in range(STEPS):
        with _counter() as counter:
            result = optimized(**case.at(step))
        done.append((first_tensor(result), counter.get_total_flops()))
    plan, report = dicompile.plan_of(optimized), dicompile.report(optimized)
    outputs, flops = zip(*done, strict=True)
    return Run(
        outputs,
        flops,
        planned=tuple(step.flops for step in plan.steps),
        kinds=tuple(step.kind for step in plan.steps),
        frames=len(optimized.frames),
        cold_starts=tuple(report.cold_starts),
    )


def _counted(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, int]:
    try:
        with _counter() as counter:
            result = model(**inputs)
    except TypeError:  # flex_attention lets nobody watch
        torch._dynamo.reset()
        return first_tensor(model(**inputs)), 0
    return first_tensor(result), counter.get_total_flops()


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def first_tensor(result: Any) -> Tensor:
    """The prediction: models return a tensor, a tuple, a list of samples or an output class."""
    return next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def eager_calls(model: nn.Module, inputs: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Calls of attention and of linear maps over tokens in an untouched model, by module path and name."""
    calls: Counter[tuple[str, str]] = Counter()
    stack = [""]

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                calls[stack[-1], "attention"] += 1
            elif func is torch.nn.functional.linear and args[0].ndim >= 3:
                calls[stack[-1], "linear"] += 1
            return func(*args, **(kwargs or {}))

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        with Counting(), torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return dict(calls)


def found_branches(structure: ModelStructure) -> dict[str, tuple[str, ...]]:
    """Kinds of branches by block path, blocks that are left and entered again taken together."""
    found: dict[str, tuple[str, ...]] = {}
    for block in structure.blocks:
        found[block.path] = found.get(block.path, ()) + tuple(SHORT[site.kind] for site in structure.sites_of(block))
    return found


def expected_branches(case: Case, paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What the case says of blocks at these paths, and of exact paths that are not among them."""
    exact = {path: kinds for path, kinds in case.branches.items() if "*" not in path and kinds}
    return exact | {path: kinds for path in paths for kinds in (_said_of(case, path),) if kinds is not None}


def _said_of(case: Case, path: str) -> tuple[str, ...] | None:
    if path in case.branches:
        return case.branches[path]
    matching = (
        kinds for pattern, kinds in case.branches.items()
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), path)
    )  # fmt: skip
    return next(matching, None)


def missing_patterns(case: Case, paths: Sequence[str]) -> list[str]:
    """Patterns of the case that no block matches."""
    return [
        pattern for pattern, kinds in case.branches.items()
        if kinds and not any(re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), path) for path in paths)
    ]  # fmt: skip


def exported_classes() -> set[str]:
    """Names of all transformer classes that diffusers exports."""
    return {
        name for name in dir(transformers)
        if isinstance(kind := getattr(transformers, name), type) and issubclass(kind, nn.Module)
    }  # fmt: skip


def class_of(case: Case) -> str:
    """Name of the class without the variant."""
    return re.split(r"\s*\[", case.name)[0]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    status: str
    blocks: int = 0
    sites: int = 0
    token_wise: int = 0
    queries: int = 0
    stored: int = 0
    reasons: tuple[str, ...] = ()
    capture: str = ""


def found_of(case: Case) -> Facts | CannotCapture:
    """Facts of a case, or why there are none."""
    try:
        return facts_of(case)
    except CannotCapture as refused:
        return refused


def row_of(case: Case, facts: Facts | CannotCapture) -> Row:
    """The line of a case."""
    if isinstance(facts, CannotCapture):
        return Row(case.name, "no", reasons=(f"{facts.what} ({facts.where})",))
    sites = facts.structure.sites
    wise = Counter(site.tokens.wise for site in sites)
    stored = sum(site.tokens.wise is TokenWise.NO and site.tokens.stored for site in sites)
    whole = wise[TokenWise.NO] - stored
    reasons = Counter(
        site.tokens.reason for site in sites if site.tokens.wise is TokenWise.NO and not site.tokens.stored
    )
    return Row(
        case.name,
        "fully" if not whole else "partly",
        blocks=len(facts.structure.blocks),
        sites=len(sites),
        token_wise=wise[TokenWise.YES],
        queries=wise[TokenWise.QUERIES],
        stored=stored,
        reasons=tuple(reason for reason, _ in reasons.most_common()),
        capture="run once" if facts.is_traced else "Dynamo",
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of docs/coverage.md."""
    classes: dict[str, set[str]] = {}
    for row in rows:
        classes.setdefault(row.case.split("[")[0].strip(), set()).add(row.status)
    order = ("no", "partly", "fully")
    best = Counter(max(statuses, key=order.index) for statuses in classes.values())
    yield "# Coverage"
    yield ""
    yield (
        f"{len(classes)} classes in {len(rows)} configurations, tiny and random, each found by structure alone: "
        f"{best['fully']} work fully, {best['partly']} partly, {best['no']} not. Made by `make coverage`; "
        "`make test` checks a line of every fifth class, `make nightly` every line."
    )
    yield ""
    yield (
        "*fully*: every site can be reused whole and refreshed token by token. *partly*: every site can be reused "
        "whole, some cannot be refreshed token by token, for the reason given. *Token-wise* counts sites that can "
        "compute chosen tokens alone: the whole branch; queries against all keys; what follows a stored attention. "
        "*Capture*: by Dynamo in one graph, or by running the model once because its Python reads values."
    )
    yield ""
    yield "| class | works | blocks | sites | token-wise | queries | behind stored attention | capture | why not |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: row.case):
        why = "<br>".join(_shortened(reason) for reason in row.reasons[:3])
        cells = (row.case, row.status, row.blocks, row.sites, row.token_wise, row.queries, row.stored, row.capture, why)
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _shortened(reason: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", reason).replace("|", "\\|")


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    rows = []
    for case in CASES:
        print(case.name, file=sys.stderr)
        rows.append(row_of(case, found_of(case)))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
