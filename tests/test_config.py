from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from dicompile.config import DebugFolder, Settings
from dicompile.errors import InvalidSetting

TRACE = logging.getLogger("torch.__trace")
ROOT = Path(__file__).resolve().parents[1]


def test_an_empty_environment_means_no_debug_folder_and_every_pass() -> None:
    home = Settings(cache=Path.home() / ".cache" / "dicompile")
    assert Settings.from_environment({}) == home
    assert Settings.from_environment({"DICOMPILE_DEBUG": "", "DICOMPILE_PASSES": "", "DICOMPILE_CACHE_DIR": ""}) == home


def test_the_cache_folder_is_the_users_another_one_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    given = Settings.from_environment({"XDG_CACHE_HOME": "/caches", "DICOMPILE_CACHE_MIB": "3"})
    assert (given.cache, given.cache_bytes) == (Path("/caches/dicompile"), 3 * 2**20)
    assert Settings.from_environment({"DICOMPILE_CACHE_DIR": "/mine"}).cache == Path("/mine")
    assert Settings.from_environment({"DICOMPILE_CACHE_DIR": "off"}).cache is None


def test_passes_are_left_out_by_name() -> None:
    found = Settings.from_environment({"DICOMPILE_PASSES": "-narrow-linear, -drop-dead,,"})
    assert found.disabled_passes == {"narrow-linear", "drop-dead"}


@pytest.mark.parametrize(("value", "check"), [("", False), ("0", False), ("1", True)])
def test_reads_are_checked_when_asked(value: str, check: bool) -> None:
    assert Settings.from_environment({"DICOMPILE_CHECK": value}).check is check


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("DICOMPILE_CHECK", "yes", "DICOMPILE_CHECK=1 checks every read of a stored value, 0 checks none"),
        ("DICOMPILE_CACHE_MIB", "2 GiB", "DICOMPILE_CACHE_MIB=2048 lets the cache folder hold 2 GiB"),
    ],
)
def test_another_value_is_refused(name: str, value: str, fix: str) -> None:
    with pytest.raises(InvalidSetting) as error:
        Settings.from_environment({name: value})
    assert str(error.value) == f"{name} cannot be {value!r}\n  where: environment\n  fix:   {fix}"


@pytest.mark.parametrize("item", ["narrow-linear", "+drop-dead"])
def test_a_pass_without_a_minus_is_refused(item: str) -> None:
    with pytest.raises(InvalidSetting) as error:
        Settings.from_environment({"DICOMPILE_PASSES": f"-drop-dead,{item}"})
    assert str(error.value) == (
        f"DICOMPILE_PASSES has the item {item!r}\n"
        "  where: environment\n"
        "  why:   passes run by default, so an item can only leave one out\n"
        f"  fix:   DICOMPILE_PASSES=-{item}"
    )


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DICOMPILE_DEBUG", str(tmp_path / "out"))
    monkeypatch.setenv("DICOMPILE_PASSES", "-drop-dead")
    monkeypatch.setenv("DICOMPILE_CHECK", "1")
    monkeypatch.setenv("DICOMPILE_CACHE_DIR", "off")
    assert Settings.from_environment() == Settings(tmp_path / "out", frozenset({"drop-dead"}), check=True)


def test_debug_files_are_numbered_in_the_order_they_were_written(tmp_path: Path) -> None:
    folder = DebugFolder(tmp_path / "new" / "folder")
    for name, content in [("captured", "graph"), ("structure", 7), ("captured", "again")]:
        folder.write(name, content)
    *files, index = sorted(folder.folder.iterdir()) if folder.folder else []
    assert index.name == "index.html"
    assert all(file.name in index.read_text(encoding="utf-8") for file in files)
    assert [file.name for file in files] == ["000-captured.txt", "001-structure.txt", "002-captured.txt"]
    assert [file.read_text(encoding="utf-8") for file in files] == ["graph\n", "7\n", "again\n"]


def test_a_second_model_writes_after_what_the_first_one_wrote(tmp_path: Path) -> None:
    DebugFolder(tmp_path).write("captured", "one")
    DebugFolder(tmp_path).write("captured", "two")
    assert [file.read_text() for file in sorted(tmp_path.glob("*.txt"))] == ["one\n", "two\n"]


def test_without_a_folder_nothing_is_written_and_no_text_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("text was made for nobody")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TRACE, "handlers", [])  # torch's own leaves at the first record if TORCH_TRACE is unset
    DebugFolder(None).write("captured", Costly())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_folder", [False, True])
def test_stages_go_to_the_structured_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_folder: bool) -> None:
    class Stage:
        made = 0

        def __str__(self) -> str:
            Stage.made += 1
            return "graph"

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(TRACE, "handlers", [handler])
    DebugFolder(tmp_path if with_folder else None).write("captured", Stage())
    ((metadata, payload),) = [(record.metadata, record.payload) for record in records]  # type: ignore[attr-defined]
    assert metadata["artifact"] == {"name": "dicompile-captured", "encoding": "string"}
    assert payload == "graph\n"
    assert Stage.made == 1
    assert [file.read_text() for file in tmp_path.glob("*.txt")] == ["graph\n"] * with_folder


def test_the_environment_is_read_in_one_file_only() -> None:
    sources = [file for part in ("dicompile", "passes", "runtime") for file in (ROOT / part).rglob("*.py")]
    reading = [file for file in sources if re.search(r"\bos\.environ\b|\bgetenv\b", file.read_text(encoding="utf-8"))]
    assert [file.relative_to(ROOT) for file in reading] == [Path("dicompile/config.py")]
