"""A plan as HTML: what every lane of sites does at every step, with work and memory below."""

from __future__ import annotations

from html import escape

from dicompile.html import fragment
from dicompile.plan.lanes import MEANING, Lane, make_lanes
from dicompile.plan.plan import Plan
from dicompile.text import operations_text, size_text

_CLASS = {"F": "F", "t": "t", "b": "b", "f": "f", ".": "r", "-": "s", "*": "x", " ": ""}
"""Classes of the style sheet for symbols of actions."""


def plan_html(plan: Plan) -> str:
    """The plan as a piece of a page; hovering over a cell says what it is."""
    lanes = make_lanes(plan)
    used = [symbol for symbol in MEANING if any(symbol in lane.cells(plan) for lane in lanes)]
    key = "".join(f'<span><i class="{_CLASS[symbol]}"></i>{MEANING[symbol]}</span>' for symbol in used)
    notes = "".join(f"<p>{escape(note)}</p>" for note in (*filter(None, [plan.no_gain()]), *plan.notes()))
    rows = "".join(_lane(plan, lane) for lane in lanes)
    return fragment(
        f"<p>{escape(_figures(plan))}</p>{notes}",
        f'<div class="wide"><table class="lanes"><thead>{_ruler(plan)}</thead>',
        f"<tbody>{rows}{_work(plan)}{_memory(plan)}</tbody></table></div>",
        f'<p class="key">{key}</p>',
    )


def _figures(plan: Plan) -> str:
    setting = f" (setting for {plan.meant_for})" if plan.meant_for else ""
    work = f"{operations_text(plan.flops)}, {plan.flop_speedup:.2f}x fewer"
    memory = f"remembers {size_text(plan.cache_bytes)} for each guidance context"
    time = f"predicted {plan.prediction(' faster')}"
    return f"{plan.policy}{setting}, {len(plan.steps)} steps: {work}; {time}; {memory}"


def _ruler(plan: Plan) -> str:
    """Numbers of the steps, every fifth one."""
    number = plan.schedule.before
    starts = range(0, len(plan.steps), 5)
    cells = "".join(
        f'<th colspan="{min(5, len(plan.steps) - start)}">{number + start}</th>' for start in starts
    )  # fmt: skip
    return f"<tr><th>step</th>{cells}</tr>"


def _lane(plan: Plan, lane: Lane) -> str:
    cells = "".join(
        f'<td title="step {plan.schedule.before + number}, {escape(lane.label)}: '
        f'{MEANING.get(symbol, "as its sites say")}"><i class="{_CLASS[symbol]}"></i></td>'
        for number, symbol in enumerate(lane.cells(plan))
    )
    return f"<tr><th>{escape(lane.label)}</th>{cells}</tr>"


def _work(plan: Plan) -> str:
    """A bar for the operations of every step."""
    whole = plan.baseline_flops / len(plan.steps) or 1
    texts = [
        f"step {plan.schedule.before + i}: {operations_text(step.flops)}, {step.flops / whole:.1%} of a full step, "
        f"predicted {plan.speedup_of(i):.2f}x"
        for i, step in enumerate(plan.steps)
    ]
    return _bars("operations", [step.flops / whole for step in plan.steps], texts)


def _memory(plan: Plan) -> str:
    """A bar for what is held after every step."""
    most = plan.cache_bytes
    if not most:
        return ""
    held = [plan.held(i) for i in range(len(plan.steps))]
    texts = [f"after step {plan.schedule.before + i}: {size_text(size)} held" for i, size in enumerate(held)]
    return _bars(f"held, at most {size_text(most)}", [size / most for size in held], texts)


def _bars(label: str, shares: list[float], texts: list[str]) -> str:
    cells = "".join(
        f'<td class="bar" title="{text}"><i style="height:{max(min(share, 1.0) * 40, 0.5):.1f}px"></i></td>'
        for share, text in zip(shares, texts, strict=True)
    )
    return f"<tr><th>{label}</th>{cells}</tr>"
