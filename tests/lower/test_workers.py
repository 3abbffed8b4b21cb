"""Workers: a graph goes to another process as bytes, is the same there, and its code is found afterwards."""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.codecache import FxGraphCachePickler
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.latest import Latest
from dicompile.lower import Backend, Code, ask_workers, inductor, requests_of, workers
from dicompile.lower.workers import Request, compile_here
from dicompile.passes import Segment
from dicompile.text import layout_text
from tests.passes.segments import mlp_block

INDUCTOR = Backend()
Asked = tuple[fx.GraphModule, Sequence[Any], FakeTensorMode]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(workers, "_ASKED", Latest(8))
    return tmp_path


def request(segment: Segment | None = None, backend: Backend = INDUCTOR) -> Request:
    with backend.in_effect():
        (made,) = requests_of([Code(segment or mlp_block().segment, backend)], backend)
    return made


def test_a_worker_gets_the_same_graph_and_settings() -> None:
    asked: list[Asked] = []
    seen: list[object] = []

    def compiled(*given: Any) -> None:
        asked.append(given)
        seen.append((torch._inductor.config.epilogue_fusion, torch._inductor.config.compile_threads))

    segment = mlp_block().segment
    sent: Request = pickle.loads(pickle.dumps(request(segment, Backend(options=(("epilogue_fusion", False),)))))
    compile_here(sent, compiled)
    (graph_module, arguments, mode), inputs = asked[0], segment.graph.find_nodes(op="placeholder")
    assert graph_module.code == fx.GraphModule(torch.nn.Module(), segment.graph).code
    assert list(map(layout_text, arguments)) == [layout_text(node.meta["val"]) for node in inputs]
    assert all(argument.fake_mode is mode for argument in arguments)
    assert seen == [(False, 1)]


def test_what_is_asked_for_is_known_by_graph_and_settings_alone() -> None:
    first = request()
    assert request().name == first.name
    assert request(backend=Backend(options=(("epilogue_fusion", False),))).name != first.name
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert request().name != first.name
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_was_compiled_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def submit(self, function: Any, sent: Request, compile_: Any) -> Future[None]:
            submitted.append(sent.name)
            function(sent, lambda *_: None)
            return Future()

    submitted: list[str] = []
    monkeypatch.setattr(workers, "_pool", Pool)
    first = request()
    assert len(ask_workers([first, request()])) == 1
    assert not ask_workers([first])
    assert submitted == [first.name]
    with torch._inductor.config.patch(force_disable_caches=True):
        assert not ask_workers([request(backend=Backend(options=(("epilogue_fusion", False),)))]), "none would be found"


def test_where_no_process_can_be_started_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def pool() -> Any:
        raise OSError("too many processes")

    pool.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(workers, "_pool", pool)
    assert not ask_workers([request()])
    assert "everything is compiled in this one: too many processes" in caplog.text


def test_asking_compiles_nothing_and_changes_nothing() -> None:
    code = Code(mlp_block().segment, INDUCTOR)
    assert len(requests_of([code], INDUCTOR)) == len(requests_of([code], INDUCTOR)) == 1
    assert not code.is_compiled


def test_keys_of_caches_do_not_depend_on_who_imported_torch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = fx.GraphModule(torch.nn.Module(), fx.Graph())

    def key(*_: Any, **__: Any) -> bytes:
        return FxGraphCachePickler(empty).dumps(torch.contiguous_format)

    monkeypatch.setattr(inductor, "standalone_compile", key)
    inside: Any = inductor._compiled(empty, (), FakeTensorMode())
    assert b"contiguous_format" in key()
    assert b"_format_of" in inside.artifact
    assert torch.memory_format not in copyreg.dispatch_table


@pytest.mark.nightly
def test_what_a_worker_compiled_is_loaded() -> None:
    code = Code(mlp_block().segment, INDUCTOR)
    for future in ask_workers(requests_of([code], INDUCTOR)):
        future.result(300)
    counters.clear()
    code.compile()
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
