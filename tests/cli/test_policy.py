"""``dicompile policies`` and ``policy show|validate|diff``."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dicompile.cli import docstrings
from dicompile.plan import Cadence, Refresh
from dicompile.policies import POLICIES, ToCa, get_policy, required_options
from tests.cli.terminal import check_fits, error_of, run

MADE = [name for name in POLICIES if not required_options(name)]


PUBLISHED_AS_CODE = {"first-block-cache": "ParaAttention, 2024", "dbcache": "cache-dit, 2025"}


def test_every_policy_has_a_line_and_a_publication() -> None:
    text = run("policies").output
    check_fits(text, 80)
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if line[0] in POLICIES] == list(POLICIES)
    assert {line[0] for line in lines if "arXiv" in line} == set(POLICIES) - {"none", *PUBLISHED_AS_CODE}
    assert all(place in text for place in PUBLISHED_AS_CODE.values())


@pytest.mark.parametrize("name", MADE)
@pytest.mark.sampled
def test_an_explained_policy_is_a_file_of_that_policy(name: str, tmp_path: Path) -> None:
    for options in ((), ("--plain",)):
        file = tmp_path / "policy.yaml"
        file.write_text(run("policy", "show", name, *options).stdout)
        assert get_policy(str(file)) == get_policy(name)
        assert run("policy", "diff", name, file).output.startswith(f"{name} and ")
        assert run("policy", "validate", file).output.startswith("valid: policy")


def test_every_field_is_explained_where_it_first_occurs() -> None:
    lines = run("policy", "show", "toca").stdout.splitlines()
    for cls in (Cadence, Refresh):
        for field in cls.model_fields:
            if field == "do":
                continue
            first = next(i for i, line in enumerate(lines) if line.lstrip(" -").startswith(f"{field}:"))
            assert lines[first - 1].lstrip().startswith("#"), field
    assert sum("share of tokens before the factors" in line for line in lines) == 1
    assert "#" not in run("policy", "show", "toca", "--plain").stdout


def test_a_policy_that_needs_a_file_explains_its_options() -> None:
    text = run("policy", "show", "l2c").output
    check_fits(text, 80)
    assert "router" in text and "arXiv 2406.01733" in text and "threshold" in text


def test_differences_are_fields(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(ToCa(interval=5, ratio=0.2).to_yaml())
    other = tmp_path / "other.yaml"
    other.write_text(ToCa(interval=5).to_yaml())
    rows = [line.split() for line in run("policy", "diff", file, other, columns=400).output.splitlines()]
    assert rows[1:] == [["rules[0].do.ratio", "0.2", "0.07"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x", "cadnce": {}}, "unknown option 'cadnce'"),
        ({"name": "x", "rules": [{"do": {"do": "refresh", "ratio": 2}}]}, "ratio"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    content: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    assert message in error_of(capsys, monkeypatch, "policy", "validate", tmp_path / "bad.yaml")


def test_models_are_listed() -> None:
    text = run("models").output
    check_fits(text, 80)
    assert ["flux.1-dev", "11.9", "B", "1024x1024", "4096", "512"] in [line.split() for line in text.splitlines()]
    assert ["wan2.1-1.3b", "1.42", "B", "480x832", "81", "32760", "512"] in [line.split() for line in text.splitlines()]


def test_docstrings_are_read_by_section() -> None:
    assert docstrings.citation(ToCa) == "arXiv 2410.05317"
    assert docstrings.entries(ToCa, "Args")["seed"] == "of the random score."
    assert docstrings.entries(ToCa, "Args")["interval"].endswith("between 20 % and 40 % of the index.")
    assert (
        docstrings.summary(ToCa)
        == docstrings.description(ToCa)
        == "Token-wise feature caching for class-conditional DiT."
    )
