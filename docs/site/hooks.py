"""Pages that the site makes of the package itself, so that nobody keeps them by hand: policies, errors, models, passes.

mkdocs calls ``on_files`` and ``on_page_markdown``; everything else is plain functions that return Markdown.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from dicompile import errors
from dicompile.analysis import Analysis
from dicompile.cli.docstrings import description, entries, reference, summary
from dicompile.cli.models import load
from dicompile.cli.policy import explained
from dicompile.errors import CacheTooLarge, DicompileError, PolicyDoesNotFit
from dicompile.passes import PASSES
from dicompile.plan import Plan, Policy, TimestepSchedule, make_plan
from dicompile.policies import POLICIES, get_policy, required_options
from dicompile.zoo import MODELS

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_PLAN = re.compile(r"<!-- plan: (\S+) (\d+) -->")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and the two files that make tables searchable."""
    made = {f"policies/{name}.md": policy_page(name) for name in POLICIES}
    made |= {"errors.md": errors_page(), "models.md": models_page(), "passes.md": passes_page()}
    made |= {name: (ROOT / "docs" / "site" / name).read_text(encoding="utf-8") for name in ("filter.js", "filter.css")}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for every policy where the navigation says ``policies/*``."""
    config.nav = [_filled(item) for item in config.nav or []]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Names of source files instead of links to them, which the site has not; drawings of plans."""
    drawn = _PLAN.sub(lambda found: _drawing(_plan(get_policy(found[1]), int(found[2]))), markdown)
    return _OUTSIDE.sub(r"`\1`", drawn)


def _drawing(plan: Plan) -> str:
    """A plan as one line of HTML, which Markdown leaves alone."""
    return plan._repr_html_().replace("\n", "")


def _filled(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    ((title, below),) = item.items()
    if isinstance(below, list):
        below = [
            new
            for one in below
            for new in ([{name: f"policies/{name}.md"} for name in POLICIES] if one == "policies/*" else [_filled(one)])
        ]
    return {title: below}


def policy_page(name: str) -> str:
    """What a policy is, its options, what it does to the demo's model, and all of it as data."""
    function = POLICIES[name]
    cited = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", reference(function))
    lines = [f"# {name}", "", summary(function), ""]
    lines += [description(function).removeprefix(summary(function)).strip().replace("\n", "\n\n"), ""]
    lines += [f"Published in: {cited}", ""] if cited else []
    needs = required_options(name)
    call = f'dicompile.get_policy("{name}", {needs[0]}="FILE")' if needs else f'"{name}"'
    lines += ["```python", f"pipe = dicompile.optimize(pipe, {call})", "```", ""]
    options = entries(function, "Args")
    if options:
        lines += ["## Options", "", "| option | meaning |", "|---|---|"]
        lines += [f"| `{option}` | {_cell(text)} |" for option, text in options.items()]
    lines += ["", f"## On the demo's model, {STEPS} steps", "", *_on_demo(name)]
    if not needs:
        lines += ["", "## As data", "", "Every field explained where it first occurs; this is a policy file, too.", ""]
        lines += ["```yaml", *explained(name), "```"]
    return "\n".join([*lines, ""])


@functools.cache
def _demo() -> Analysis:
    return load("demo").analysis()


def _plan(policy: Policy, steps: int) -> Plan:
    """What a policy does to the demo's model."""
    return make_plan(_demo().structure(policy.trunk), policy, TimestepSchedule.of(steps))


def _on_demo(name: str) -> Iterator[str]:
    """A drawing of the plan, or why there is none."""
    assets = ROOT / "dicompile" / "demo" / "assets"
    published = [int(bit) for bit in "10001001001010101010101010101010101010101010101011"]
    learned = {
        "router": str(assets / "l2c_router.safetensors"),
        "predictor": str(assets / "tokencache_predictor.safetensors"),
        "weights": [[float(column == row) for column in range(STEPS)] for row in range(STEPS)],  # reuse
        "schedule": {"attn": published, "mlp": published},  # for DiT-XL/2 in 50 steps, threshold 0.18
    }
    given = {option: learned[option] for option in required_options(name)}
    try:
        plan = _plan(get_policy(name, **given), STEPS)
    except (PolicyDoesNotFit, CacheTooLarge, DicompileError) as error:
        yield f"It does not fit: {error.what}" + (f" ({error.why})." if error.why else ".")
        return
    yield _drawing(plan)


def errors_page() -> str:
    """Every error by name: what it means, and the messages with what to do."""
    lines = [
        "# Errors by name",
        "",
        "Each is a `dicompile.DicompileError` with the fields `what`, `where`, `why` and `fix`. "
        "What stands for a name or a number is written as ….",
    ]
    said = _messages()
    for name, error in sorted(vars(errors).items()):
        if not (inspect.isclass(error) and issubclass(error, DicompileError) and error is not DicompileError):
            continue
        kinds = " and ".join(f"`{base.__name__}`" for base in error.__bases__ if base is not DicompileError)
        lines += ["", f"## {name}", "", f"{summary(error)} Also a {kinds}.", ""]
        rows = sorted(said.get(name, ()))
        if rows:
            lines += ["| what | what to do |", "|---|---|", *(f"| {_cell(w)} | {_cell(fix)} |" for w, fix in rows)]
    return "\n".join([*lines, ""])


def _messages() -> dict[str, set[tuple[str, str]]]:
    """Texts that the package raises, by name of the error."""
    found: dict[str, set[tuple[str, str]]] = {}
    for folder in ("dicompile", "passes", "runtime"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                    what = _text(node.args[0])
                    fix = next((_text(word.value) for word in node.keywords if word.arg == "fix"), "")
                    if what:
                        found.setdefault(node.func.id, set()).add((what, fix))
    return found


def _text(node: ast.expr) -> str:
    """The words of a string, with … for what is filled in; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    return ""


def models_page() -> str:
    """The models whose published configs are bundled."""
    lines = [
        "# Well-known models",
        "",
        "Their configs are bundled: `dicompile inspect NAME` and `plan NAME` need neither weights nor network. "
        "Which classes work, and how far, is in [the coverage table](coverage.md).",
        "",
        "| name | model | class | parameters | config |",
        "|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        kind, source = model.config()["_class_name"], _cell(model.source)
        lines.append(f"| `{name}` | {model.title} | `{kind}` | {model.billions} B | {source} |")
    return "\n".join([*lines, ""])


def passes_page() -> str:
    """The passes in their order, from their modules' own words."""
    lines = [
        "# Passes",
        "",
        "In this order. `DICOMPILE_PASSES=-narrow-linear` leaves one out by name, `DICOMPILE_DEBUG=folder` shows what "
        "each makes of a piece of the model.",
    ]
    for one in dict.fromkeys(PASSES):
        module = importlib.import_module(type(one).__module__)
        text = re.sub(r"^(Before|After)::$", r"**\1**", inspect.getdoc(module) or "", flags=re.MULTILINE)
        text = text.replace("``", "`")
        lines += ["", f"## {one.name}", "", text]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    """Text for a cell of a table: one line, nothing that Markdown or HTML would take for its own."""
    for mark, spelled in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " "), ("*", "\\*"), ("_", "\\_")):
        text = text.replace(mark, spelled)
    return text
