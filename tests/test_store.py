"""The cache folder: ours alone, whole files, bounded; whatever is wrong with it costs time and nothing else."""

from __future__ import annotations

import enum
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from dicompile import store as store_module
from dicompile.cli.main import app
from dicompile.store import Store, Unwritable, key_of, packed, spelled, unpacked, version

MANY = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def found(store: Store, key: str = "key") -> list[bytes]:
    return [kept.content for kept in store.get("code", key)]


def test_what_one_process_keeps_another_one_finds(folder: Path) -> None:
    Store(folder, MANY).put("code", "key", b"one")
    Store(folder, MANY).put("code", "key", b"two")
    assert set(found(Store(folder, MANY))) == {b"one", b"two"}
    assert found(Store(folder, MANY), "other") == []
    assert list(Store(folder, MANY).get("capture", "key")) == []


def test_nobody_else_may_read_or_write_what_is_kept(folder: Path) -> None:
    old = os.umask(0)
    try:
        Store(folder, MANY).put("code", "key", b"one")
    finally:
        os.umask(old)
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("which", ["folder", "version", "file"])
def test_what_others_may_write_to_is_not_used(folder: Path, which: str, caplog: pytest.LogCaptureFixture) -> None:
    Store(folder, MANY).put("code", "key", b"one")
    (file,) = folder.rglob("code-*")
    {"folder": folder, "version": file.parent, "file": file}[which].chmod(0o777)
    store = Store(folder, MANY)
    assert found(store) == found(store) == []
    if which != "file":
        store.put("code", "other", b"two")
        assert len(list(folder.rglob("code-*"))) == 1
    assert "may be written to by other users" in caplog.text
    assert len(caplog.records) == (2 if which == "file" else 1)


def test_what_belongs_to_others_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Store(folder, MANY).put("code", "key", b"one")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert found(Store(folder, MANY)) == []
    assert "belongs to another user" in caplog.text


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    Store(folder, MANY).put("code", "key", b"one")
    (file,) = folder.rglob("code-*")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert found(Store(folder, MANY)) == []


@pytest.mark.parametrize("damage", [b"", b"dicompile 1\n", b"x" * 200, None])
def test_a_damaged_file_is_removed_and_written_anew(
    folder: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(folder, MANY)
    store.put("code", "key", b"one" * 100)
    (file,) = folder.rglob("code-*")
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    assert found(store) == []
    assert "is damaged, so it is not used" in caplog.text
    assert not file.exists()
    store.put("code", "key", b"one" * 100)
    assert found(store) == [b"one" * 100]


def test_those_that_were_not_used_for_longest_go(folder: Path) -> None:
    store = Store(folder, 2500)
    for age, key in enumerate(("third", "second", "first")):
        store.put("code", key, b"x" * 700)
        (file,) = folder.rglob(f"code-{key}-*")
        os.utime(file, (1000 + age, 1000 + age))
    next(store.get("code", "third")).used()
    assert found(store, "second"), "which was of no use"
    store.put("code", "new", b"x" * 700)
    kept = {key for key in ("first", "second", "third", "new") if found(store, key)}
    assert kept == {"first", "third", "new"}


@pytest.mark.parametrize("fault", ["full", "read-only", "interrupted"])
def test_a_folder_that_cannot_be_written_to_is_left_unused(
    folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = {"full": OSError(28, "No space left"), "read-only": PermissionError(13, "Read-only"),
              "interrupted": KeyboardInterrupt()}  # fmt: skip

    def fail(*_: object, **__: object) -> None:
        raise errors[fault]

    store = Store(folder, MANY)
    store.put("code", "before", b"one")
    monkeypatch.setattr(Path, "replace" if fault != "read-only" else "mkdir", fail)
    if fault == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            store.put("code", "key", b"one")
    else:
        store.put("code", "key", b"one")
        store.put("code", "key", b"one")
        assert len(caplog.records) == 1, "said once"
    monkeypatch.undo()
    assert [path.name.split("-")[1] for path in folder.rglob("*.dicompile")] == ["before"]


def test_a_folder_that_is_a_file_and_none_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file", MANY)
    store.put("code", "key", b"one")
    assert found(store) == []
    assert len(caplog.records) == 1
    nothing = Store(None, MANY)
    nothing.put("code", "key", b"one")
    assert (found(nothing), nothing.entries(), nothing.is_open) == ([], [], False)


def test_all_code_is_part_of_the_version() -> None:
    root = Path(__file__).parents[1]
    for folder in ("dicompile", "passes", "runtime"):
        assert {*(root / folder).rglob("*.py")} <= {*store_module._sources()}


def test_another_version_finds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(folder, MANY).put("code", "key", b"one")
    assert version().startswith(f"torch{torch.__version__}-")
    monkeypatch.setattr(store_module, "version", lambda: "torch9-0")
    assert found(Store(folder, MANY)) == []
    assert len(Store(folder, MANY).entries()) == 1, "but it counts, and can be removed"


class Colour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    first: object
    second: object


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), ((1, 2), [1, 2]), (torch.float32, "torch.float32"), (Colour.RED, 1),
     (Pair(1, 2), (1, 2)), (int, "int"), (("a", "b"), ("a, str 'b'",)), (None, "None"), (torch.Size([1]), (1,))],
)  # fmt: skip
def test_what_means_something_else_is_spelled_otherwise(one: object, other: object) -> None:
    assert spelled(one) != spelled(other)
    assert key_of(one) != key_of(other)


def test_sets_are_spelled_in_one_order() -> None:
    assert spelled(frozenset("abcdefgh")) == spelled(frozenset("hgfedcba"))


@pytest.mark.parametrize("value", [object(), [object()], lambda: 0, torch.zeros(1)])
def test_what_means_something_in_this_process_only_is_not_spelled(value: object) -> None:
    with pytest.raises(Unwritable):
        spelled(value)


def test_data_and_bytes_come_back() -> None:
    assert unpacked(packed([1, "a\n"], {"x": b"\n1\n", "": b""})) == ([1, "a\n"], {"x": b"\n1\n", "": b""})


def test_the_command_line_shows_and_clears_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMPILE_CACHE_DIR", str(folder))
    Store(folder, MANY).put("code", "key", b"x" * 2000)
    Store(folder, MANY).put("capture", "key", b"x" * 2000)
    shown = CliRunner().invoke(app, ["cache", "info"], env={"COLUMNS": "200"}).output
    assert str(folder) in shown
    assert re.search(rf"{re.escape(version())}.*\b1\b.*\b1\b.*KiB", shown)
    assert "removed 2 files" in CliRunner().invoke(app, ["cache", "clear"]).output
    assert not list(folder.rglob("*.dicompile"))
    monkeypatch.setenv("DICOMPILE_CACHE_DIR", "off")
    assert "is off" in CliRunner().invoke(app, ["cache", "info"]).output


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new folder" / "router.safetensors"
    store_module.save_tensors(file, {"logits": torch.ones(3)}, {"made": "first"})
    before = file.read_bytes()

    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store_module.save_tensors(file, {"logits": torch.zeros(3)}, {"made": "second"})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["router.safetensors"]
