"""``dicompile policies`` and ``dicompile policy show|validate|diff``: policies as the data that they are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from dicompile.cli.docstrings import all_entries, citation, description, entries, reference, summary
from dicompile.cli.show import BAD, FAINT, GOOD, make_console
from dicompile.policies import POLICIES, get_policy, required_options

policy_app = typer.Typer(no_args_is_help=True, help="A caching policy as data: explained, checked, compared.")

Source = Annotated[str, typer.Argument(help="Policy name, or a YAML or JSON file.")]
INDENT = "  "


def policies() -> None:
    """List the published policies."""
    table = Table(box=None, pad_edge=False, header_style=FAINT)
    table.add_column("policy", no_wrap=True)
    table.add_column("what it is")
    table.add_column("publication", no_wrap=True)
    for name, function in POLICIES.items():
        needs = required_options(name)
        trained = Text(f" Needs a trained {needs[0]}.", FAINT) if needs else Text()
        table.add_row(name, Text(summary(function)) + trained, Text(citation(function) or "-"))
    console = make_console()
    console.print(table)
    console.print("dicompile policy show NAME explains one, field by field", style=FAINT)


@policy_app.command()
def show(
    name: Source,
    plain: Annotated[bool, typer.Option("--plain", help="YAML without explanations.")] = False,
) -> None:
    """Explain a policy field by field: YAML with comments, which is a policy file, too."""
    console = make_console()
    if name in POLICIES and required_options(name):
        _show_options(console, name)
        return
    lines = explained(name) if not plain else _mapping(get_policy(name), 0, None)
    if console.is_terminal:
        console.print(Syntax("\n".join(lines), "yaml", background_color="default", word_wrap=True))
    else:
        typer.echo("\n".join(lines))


def explained(name: str) -> list[str]:
    """A policy as lines of YAML, with comments that explain every field."""
    lines: list[str] = []
    if name in POLICIES:
        lines += [*_comment(description(POLICIES[name]), 0), *_comment(reference(POLICIES[name]), 0), ""]
    return [*lines, *_mapping(get_policy(name), 0, set())]


def _show_options(console: Console, name: str) -> None:
    """A policy that is made from a file that was trained for the model has options instead of fields."""
    function = POLICIES[name]
    console.print(Text(name, "bold"))
    for text in (description(function), reference(function)):
        console.print(text)
    table = Table(box=None, pad_edge=False, header_style=FAINT)
    table.add_column("option", no_wrap=True)
    table.add_column("meaning")
    for option, meaning in entries(function, "Args").items():
        table.add_row(option, meaning)
    console.print(table)
    console.print(
        f"It follows what was learned for one model: get_policy({name!r}, {required_options(name)[0]}='file')"
    )


def _mapping(model: BaseModel, depth: int, explained: set[tuple[type, str]] | None) -> list[str]:
    """Fields of frozen data as lines of YAML; every field is explained where it first occurs.

    Args:
        model: the data.
        depth: of the indentation.
        explained: fields that were; None explains nothing.
    """
    texts = all_entries(type(model))
    lines: list[str] = []
    for field in type(model).model_fields:
        value = getattr(model, field)
        if explained is not None and (type(model), field) not in explained:
            explained.add((type(model), field))
            lines += _comment(texts.get(field, ""), depth)
        elif value == type(model).model_fields[field].default and field != "do":
            continue  # a later one of its kind shows what is different
        lines += _value(field, value, depth, explained)
    return lines


def _value(field: str, value: Any, depth: int, explained: set[tuple[type, str]] | None) -> list[str]:
    margin = INDENT * depth
    if isinstance(value, BaseModel):
        return [f"{margin}{field}:", *(_mapping(value, depth + 1, explained) or [f"{margin}{INDENT}{{}}"])]
    if isinstance(value, tuple) and value and all(isinstance(item, BaseModel) for item in value):
        return [f"{margin}{field}:", *(line for item in value for line in _item(item, depth, explained))]
    plain = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**6).strip().removesuffix("\n...")
    return [f"{margin}{field}: {plain}"]


def _item(item: BaseModel, depth: int, explained: set[tuple[type, str]] | None) -> list[str]:
    """An entry of a list: the dash stands before its first field."""
    lines = _mapping(item, depth + 1, explained) or [f"{INDENT * (depth + 1)}{{}}"]
    first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
    margin = INDENT * depth
    return [*lines[:first], f"{margin}- {lines[first].lstrip()}", *lines[first + 1 :]]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _comment(text: str, depth: int) -> list[str]:
    start = f"{INDENT * depth}# "
    return [line for part in text.splitlines() for line in textwrap.wrap(part, 100, initial_indent=start,
            subsequent_indent=start, break_long_words=False)]  # fmt: skip


@policy_app.command()
def validate(file: Source) -> None:
    """Check a policy file; an error names the key that is wrong, and the exit code is 1."""
    policy = get_policy(file)
    console = make_console()
    console.print(Text.assemble(("valid: ", GOOD), f"policy {policy.name!r} with {len(policy.rules)} rules"))
    if not policy.rules:
        console.print(Text("it has no rules: every site is computed at every step", BAD))


@policy_app.command()
def diff(one: Source, other: Source) -> None:
    """Compare two policies, field by field."""
    first, second = (dict(_flat(get_policy(name).to_dict())) for name in (one, other))
    paths = [path for path in {**first, **second} if first.get(path) != second.get(path)]
    console = make_console()
    if not paths:
        console.print(f"{one} and {other} are the same")
        return
    table = Table(box=None, pad_edge=False, header_style=FAINT)
    for head in ("field", one, other):
        table.add_column(Text(head), overflow="fold")
    for path in paths:
        table.add_row(path, *(Text(_shown(side, path)) for side in (first, second)))
    console.print(table)


def _shown(fields: dict[str, Any], path: str) -> str:
    return str(fields[path]) if path in fields else "-"


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of plain data with its path: "rules[0].do.ratio"."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        for number, item in enumerate(data):
            yield from _flat(item, f"{path}[{number}]")
    else:
        yield path, data
