"""Files from outside are data: whatever is done to one, it is read, or refused by name, and nothing of it runs."""

from __future__ import annotations

import io
import pickle
import resource
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dicompile
from dicompile import outside
from dicompile.errors import (
    DicompileError,
    InvalidPolicy,
    InvalidPredictor,
    InvalidRecording,
    InvalidRouter,
    InvalidTiming,
)
from dicompile.learn.checkpoint import load_checkpoint
from dicompile.learn.latents import Latents
from dicompile.learn.recording import Recording
from dicompile.learn.trace import Facts, Growth, Trace
from dicompile.plan import Policy, Predictor, TimedKind, Timing, TimingFacts, load_predictor
from dicompile.plan.predictor import PredictorFacts
from dicompile.policies import LearningToCache, get_policy, load_router, save_router, schedule_to_json
from dicompile.policies.router import Router, RouterFacts

MOST_SECONDS = 5.0
MOST_BYTES = 200 << 20

_WATCHED: set[str] | None = None
_FORBIDDEN = ("exec", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.remove")


def _watch(event: str, args: Any) -> None:
    if _WATCHED is None or event not in _FORBIDDEN:
        return
    if event != "exec" or args[0].co_filename == "<string>":  # modules that are imported late are files
        _WATCHED.add(event)


sys.addaudithook(_watch)


def saved(write: Callable[[Path], Any], folder: Path, name: str) -> bytes:
    path = folder / name
    write(path)
    return path.read_bytes()


def router() -> Router:
    generator = torch.Generator().manual_seed(0)
    return Router(torch.rand(4, 6, generator=generator), "ddim", 0.1, RouterFacts(sites=(), model="DiT"))


def predictor() -> Predictor:
    facts = PredictorFacts(
        kind="table", blocks=("0", "1"), timesteps=(9.0, 5.0, 1.0), penalty=0.1, seed=0, iterations=1
    )
    return Predictor(torch.rand(3, 2, 16), facts, {"w": torch.rand(3, 3)}, "a test")


def recording() -> Recording:
    facts = Facts(
        model="DiT", sites=("0.self-attention", "0.mlp"), steps=3, full_flops=9, site_flops=1, stack_flops=1,
        site_bytes=4, stack_bytes=4,
    )  # fmt: skip
    values, levels = len(facts.values), len(facts.levels)
    trace = Trace(0, "a", torch.eye(3).repeat(values, 1, 1), torch.zeros(levels, 3))
    return Recording(facts, [trace], [Growth(1, 2.0)])


def timing() -> Timing:
    facts = TimingFacts(
        model="DiT", sites=("0.self-attention", "0.mlp"), spans=(), latent=(1, 4, 8, 8), dtype="float32",
        device="a machine", code="inductor",
    )  # fmt: skip
    return Timing(facts, [TimedKind(name="full", flops=9, bytes=4, seconds=(0.25, 0.5))])


def published(path: Path) -> None:
    torch.save({"routers": {f"{k}.prob": torch.rand(6) for k in range(4)}}, path)


def schedule() -> str:
    return schedule_to_json(torch.tensor([[True, False], [True, True], [False, True]]), ["0.self-attention", "0.mlp"])


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content, encoding="utf-8")


# What is written, under which name, and what reads it.
FILES: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], Any]]] = {
    "policy, YAML": (text(get_policy("toca").to_yaml()), "policy.yaml", lambda path: get_policy(str(path))),
    "policy, JSON": (text(get_policy("duca").to_json()), "policy.json", lambda path: get_policy(str(path))),
    "router": (lambda path: save_router(router(), path), "router.safetensors", load_router),
    "published router": (published, "router.pt", load_router),
    "recording": (lambda path: recording().save(path), "recording.safetensors", Recording.load),
    "timing": (lambda path: timing().save(path), "timing.json", Timing.load),
    "schedule": (text(schedule()), "schedule.json", LearningToCache),
    "predictor": (lambda path: predictor().save(path), "predictor.safetensors", load_predictor),
    "latents": (
        lambda path: save_file({"latents": torch.rand(2, 4, 4)}, path),
        "latents.safetensors",
        Latents.load,
    ),
    "checkpoint": (
        lambda path: torch.save({"key": "a", "state": [torch.rand(3), 1]}, path),
        "checkpoint.pt",
        lambda path: load_checkpoint(path, InvalidRouter),
    ),
}

PIECES = [
    b"[" * 3000, b"{" * 500, b"&a ", b"*a", b"<<: *a\n", b"9" * 5000, b"1e999", b"-", b"\x00", b"\xff\xfe", b"null",
    b"!!python/object/apply:os.system ['true']", b"!!timestamp x", b"2001-99-99", b": ", b"\n- ", b'":', b"NaN",
    b"cos\nsystem\n",     b"\x80\x04\x95", b"(S'true'\ntR.", b"18446744073709551615", b"PK\x03\x04",
]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "truncate", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(PIECES),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits: list[tuple[str, float, float, bytes, int]]) -> bytes:
    """A file after some edits."""
    for what, first, second, piece, byte in edits:
        at = int(first * len(content))
        size = int(second * min(64, len(content) - at)) + 1
        if what == "flip":
            content = content[:at] + bytes([byte]) + content[at + 1 :]
        elif what == "cut":
            content = content[:at] + content[at + size :]
        elif what == "insert":
            content = content[:at] + piece + content[at:]
        elif what == "repeat":
            content = content[:at] + content[at : at + size] * (byte + 1) + content[at + size :]
        elif what == "truncate":
            content = content[:at]
        else:
            digits = [i for i, c in enumerate(content) if c in b"0123456789"]
            if digits:
                place = digits[int(first * len(digits))]
                content = content[:place] + str(byte * 10 ** (byte % 20)).encode() + content[place + 1 :]
    return content


def memory() -> int:
    """Most bytes that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(read: Callable[[Path], Any], path: Path) -> None:
    """Read a file that anything may have happened to."""
    global _WATCHED  # noqa: PLW0603
    before, began = memory(), time.monotonic()
    _WATCHED = set()
    try:
        read(path)
    except DicompileError as error:
        assert len(str(error)) < 4000
    finally:
        seen, _WATCHED = _WATCHED, None
    assert not seen
    assert time.monotonic() - began < MOST_SECONDS
    assert memory() - before < MOST_BYTES


def fuzz(kind: str, folder: Path, examples: int) -> None:
    write, name, read = FILES[kind]
    content = saved(write, folder, name)
    read(folder / name)

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(edits=EDITS)
    def run(edits: list[tuple[str, float, float, bytes, int]]) -> None:
        path = folder / name
        path.write_bytes(edited(content, edits))
        check(read, path)

    run()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, 60)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_damaged_files_are_read_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, -(-10_000 // len(FILES)))


# What a fuzzer does not find: texts that are small and mean something large.

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {a: 1, b: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)
TEXTS = {
    "aliases of aliases": LAUGHS,
    "merges of merges": MERGES,
    "a list in itself": "&a [*a]",
    "deep lists": "[" * 900 + "]" * 900,
    "very deep lists": "[" * 100_000,
    "a class": "!!python/object/apply:os.system ['true']",
    "no timestamp": "!!timestamp x",
    "no date": "name: 2001-99-99",
    "a number that is too long": "seed: " + "9" * 5000,
    "too much": "# " + "x" * outside.MOST_TEXT,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_means_more_than_it_says_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(TEXTS[name], encoding="utf-8")
    with pytest.raises(InvalidPolicy):
        get_policy(str(path))
    check(lambda path: get_policy(str(path)), path)
    with pytest.raises(InvalidPolicy):
        Policy.from_json(TEXTS[name])


def test_what_we_write_is_read_again() -> None:
    policy = get_policy("toca")
    assert Policy.from_yaml(policy.to_yaml()) == Policy.from_json(policy.to_json()) == policy
    assert outside.from_yaml("[&a [1], *a]") == [[1], [1]]


def hostile(path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({str(path.with_suffix('.ran'))!r}, 'w')",)

    torch.save({"routers": Run(), "key": Run()}, path)


def views(path: Path) -> None:
    """Rows that are a number each, and claim to be a billion."""
    one = torch.zeros(1)
    torch.save({"routers": {f"{k}.prob": one.expand(1 << 30) for k in range(8)}}, path)


def same_row(path: Path) -> None:
    """One row, referred to ten thousand times."""
    row = torch.zeros(100_000)
    torch.save({"routers": {f"{k}.prob": row for k in range(10_000)}}, path)


def compressed(path: Path) -> None:
    """A megabyte of zeros for every kilobyte of the file."""
    published(path)
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part) + bytes(1 << 26) * ("data/" in part.filename))
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize("write", [hostile, views, same_row, compressed])
def test_a_pickle_that_means_more_than_it_says_is_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "router.pt"
    write(path)
    with pytest.raises(InvalidRouter):
        load_router(path)
    check(load_router, path)
    check(lambda path: load_checkpoint(path, InvalidRouter), path)
    assert not path.with_suffix(".ran").exists()


def test_a_plain_pickle_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "router.pt"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(InvalidRouter):
        load_router(path)


@pytest.mark.parametrize(
    ("name", "load", "error"),
    [
        ("router.safetensors", load_router, InvalidRouter),
        ("router.pt", load_router, InvalidRouter),
        ("predictor.safetensors", load_predictor, InvalidPredictor),
        ("recording.safetensors", Recording.load, InvalidRecording),
        ("timing.json", Timing.load, InvalidTiming),
    ],
)
def test_a_file_that_is_too_large_is_not_read(name: str, load: Any, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(outside.MOST_BYTES + 1)  # it takes no room
    with pytest.raises(error, match="more than"):
        load(path)


def test_a_recording_is_refused_by_name_however_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "recording.safetensors"
    save_file({"gram/0/a": torch.eye(2)}, path, metadata={"dicompile.recording": "[" * 5000})
    with pytest.raises(InvalidRecording):
        Recording.load(path)
    with pytest.raises(InvalidRecording):
        dicompile.optimize(torch.nn.Linear(2, 2), "auto", recording=str(path), speedup=2, schedule=4)
