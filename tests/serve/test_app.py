"""The replica of examples/serve, around a stand-in for FastAPI and Ray Serve: their decorators, answers and metrics.

On Ray itself the edges of the service are tried by the script of the load test (`test_service.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import io
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.standins import install

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "serve"
STEPS = 5


class HTTPException(Exception):
    def __init__(self, status_code: int, detail: str, headers: dict[str, str]) -> None:
        self.status_code, self.detail, self.headers = status_code, detail, headers
        super().__init__(detail)


class Response:
    def __init__(self, content: Any, media_type: str) -> None:
        self.content, self.media_type = content, media_type


class FastAPI:
    @staticmethod
    def _route(_: str) -> Callable[[Any], Any]:
        return lambda function: function

    get = post = _route


class Metric:
    """As strict as Ray's: counters only grow, and tags are those that were named."""

    made: dict[str, Metric] = {}  # noqa: RUF012 - cleared for every test

    def __init__(
        self, name: str, description: str = "", boundaries: Sequence[float] = (), tag_keys: tuple[str, ...] = ()
    ) -> None:
        assert all(bound > 0 for bound in boundaries)
        self.tag_keys, self.values = tag_keys, Counter[tuple[str, ...]]()
        Metric.made[name] = self

    def key(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        assert set(tags or ()) == set(self.tag_keys)
        return tuple((tags or {}).values())

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        self.values[self.key(tags)] += value

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self.key(tags)] = value

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value >= 0
        self.values[self.key(tags)] += 1


def deployment(**declared: Any) -> Callable[[Any], Any]:
    """The class itself, which Ray would put into another one; and what it was told where that is asked for."""

    def decorate(replica: Any) -> Any:
        def options(**more: Any) -> Any:
            def bind(*args: Any, **kwargs: Any) -> Any:
                return declared | more, inspect.signature(replica).bind(*args, **kwargs).arguments

            return SimpleNamespace(bind=bind)

        replica.declared, replica.options = declared, options
        return replica

    return decorate


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, as Ray imports it."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    metrics = ModuleType("ray.serve.metrics")
    vars(metrics).update(Counter=Metric, Gauge=Metric, Histogram=Metric)
    serving = ModuleType("ray.serve")
    vars(serving).update(
        deployment=deployment, ingress=lambda _: lambda replica: replica, metrics=metrics, Application=object,
        get_replica_context=lambda: context,
    )  # fmt: skip
    fastapi = {"FastAPI": FastAPI, "HTTPException": HTTPException, "Response": Response}
    monkeypatch.setitem(sys.modules, "ray.serve", serving)
    install(
        monkeypatch,
        {
            "ray": {"serve": serving},
            "fastapi": fastapi | {"Query": lambda default, **_: default},
            "fastapi.responses": {"StreamingResponse": Response},
        },
    )
    monkeypatch.setattr(Metric, "made", {})
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("app", "engine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("app")


def replica_of(app: ModuleType, **options: Any) -> Any:
    """A replica that has not warmed up, which takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.Engine, "warm_up", lambda _: None)
        return app.Pictures(backend="eager", **{"sizes": (1,)} | options)


def order(app: ModuleType, **options: Any) -> Any:
    return app.Wanted(**{"label": 7, "steps": STEPS, "tier": "balanced"} | options)


async def split(stream: AsyncIterator[bytes]) -> list[bytes]:
    """What lies after each line of a stream, or the line that ends it early."""
    whole, files = b"".join([chunk async for chunk in stream]), []
    while whole and not whole.startswith(b"!"):
        length, _, rest = whole.partition(b"\n")
        files.append(rest[: int(length)])
        whole = rest[int(length) :]
    return files + ([whole] if whole else [])


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)), dtype=int)


def idle(replica: Any) -> bool:
    served = replica.engine.batcher.served()
    return (served.open, served.waiting, served.queued, served.cache_bytes, served.reserved_bytes) == (0,) * 5


def test_a_replica_warms_up_before_it_serves(app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(app.Engine, "warm_up", lambda engine: ran.append(len(engine.batcher.turns.sizes)))
    app.Pictures(backend="eager", sizes=(1, 2))
    assert ran == [2]


@pytest.mark.parametrize("previews", [2, 3, STEPS, STEPS + 4])
@pytest.mark.sampled
def test_a_stream_shows_the_picture_at_every_so_many_steps(app: ModuleType, previews: int) -> None:
    replica = replica_of(app)
    answer = asyncio.run(replica.picture(order(app), previews))
    files = asyncio.run(split(answer.content))
    _, pictures = replica.engine.open(app.Order(7, 0, STEPS, "balanced"))
    steps = [app.png(picture) for picture in pictures]
    assert files == [*steps[previews - 1 : STEPS - 1 : previews], steps[-1]]
    whole = asyncio.run(replica.picture(order(app), 0))
    assert (whole.content, whole.media_type) == (files[-1], "image/png")
    assert pixels(files[0]).shape == pixels(files[-1]).shape


def test_a_client_that_hangs_up_in_the_middle_frees_what_it_held(app: ModuleType) -> None:
    replica = replica_of(app)

    async def hang_up() -> None:
        answer = await replica.picture(order(app), 1)
        for _ in range(2):  # of the first step nothing is reused
            await anext(answer.content)
        assert replica.engine.batcher.served().cache_bytes > 0
        await answer.content.aclose()

    asyncio.run(hang_up())
    assert idle(replica)
    assert replica.engine.batcher.served().cancelled == 1


def test_a_request_that_is_cancelled_while_it_computes_frees_what_it_held(app: ModuleType) -> None:
    replica = replica_of(app)

    async def hang_up() -> None:
        task = asyncio.create_task(replica.picture(order(app, steps=100), 0))
        while not replica.engine.batcher.served().cache_bytes:
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(hang_up())
    replica._threads.shutdown()
    assert idle(replica)


def test_an_order_that_takes_too_long_is_told_so(app: ModuleType) -> None:
    replica = replica_of(app)
    asyncio.run(replica.picture(order(app), 0))  # captures
    with pytest.raises(HTTPException, match=r"longer than 0\.001 s") as raised:
        asyncio.run(replica.picture(order(app, timeout=0.001), 0))
    assert (raised.value.status_code, raised.value.headers) == (503, {"Retry-After": "1"})

    async def late() -> list[bytes]:
        answer = await replica.picture(order(app, timeout=0.2, steps=100), 1)
        stream = answer.content
        first = await anext(stream)
        await asyncio.sleep(0.3)
        return [first, *[chunk async for chunk in stream]]

    assert asyncio.run(late())[-1] == b"! the request took longer than 0.2 s\n"
    assert idle(replica)
    assert replica.engine.batcher.served().timed_out == 2


def bytes_of_one(app: ModuleType) -> int:
    """What one order of the tier "balanced" remembers."""
    replica = replica_of(app)
    asyncio.run(replica.picture(order(app), 0))
    most: int = replica.engine.batcher.served().most_reserved_bytes
    return most


def test_where_too_many_wait_for_memory_the_next_is_refused(app: ModuleType) -> None:
    replica = replica_of(app, max_cache_bytes=bytes_of_one(app), most_queued=2)

    async def crowd() -> list[Any]:
        first = (await replica.picture(order(app), 1)).content
        await anext(first)  # it has all memory there is, for now
        waiting = [asyncio.create_task(replica.picture(order(app, seed=i), 0)) for i in (1, 2)]
        while replica.engine.batcher.served().queued < 2:
            await asyncio.sleep(0.001)
        with pytest.raises(HTTPException) as raised:
            await replica.picture(order(app, seed=3), 0)
        assert (raised.value.status_code, raised.value.headers) == (429, {"Retry-After": "1"})
        await first.aclose()
        return await asyncio.gather(*waiting)

    assert len(asyncio.run(crowd())) == 2
    assert idle(replica)


def test_a_replica_takes_more_orders_than_may_wait_for_memory(app: ModuleType) -> None:
    """Else Serve would keep them, and nobody would ever be told 429."""
    assert app.Pictures.declared["max_ongoing_requests"] > app.MOST_QUEUED


def test_who_waits_for_memory_keeps_nobody_from_going_on(app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_AT_ONCE", 12)  # threads; asyncio has four more than there are cores
    replica = replica_of(app, max_cache_bytes=bytes_of_one(app), most_queued=40)

    async def crowd() -> list[Any]:
        first = (await replica.picture(order(app), 1)).content
        await anext(first)
        count = app.MOST_AT_ONCE - 1
        waiting = [asyncio.create_task(replica.picture(order(app, seed=i, steps=3), 0)) for i in range(count)]
        while replica.engine.batcher.served().queued < count:
            await asyncio.sleep(0.001)
        rest = [chunk async for chunk in first]
        assert len(rest) == STEPS - 1
        return await asyncio.gather(*waiting)

    assert len(asyncio.run(asyncio.wait_for(crowd(), 60))) == app.MOST_AT_ONCE - 1


def test_health_fails_where_calls_wait_and_nothing_runs(app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_of(app, sizes=(1, 2))
    monkeypatch.setattr(app, "STUCK", 0.5)

    async def stuck() -> None:
        await replica.check_health()
        with replica.engine.batcher.turns.patient(60.0):
            idle_request, _ = replica.engine.open(app.Order(1))  # for which the other one waits
            answer = asyncio.create_task(replica.picture(order(app, steps=1), 0))
            while not replica.engine.batcher.served().waiting:
                await replica.check_health()
                await asyncio.sleep(0.001)
            await replica.check_health()  # it may be about to go on
            await asyncio.sleep(0.6)
            with pytest.raises(RuntimeError, match=r"1 calls wait, and nothing has run for 0\.5 s"):
                await replica.check_health()
            idle_request.cancel()
            await answer
        await replica.check_health()

    asyncio.run(stuck())


def test_metrics_count_what_came_since_the_last_time(app: ModuleType) -> None:
    replica = replica_of(app)

    async def serve() -> None:
        await replica.picture(order(app), 0)
        stream = (await replica.picture(order(app, tier="best"), 1)).content
        await anext(stream)
        await replica.check_health()
        assert found["dicompile_open_requests"] == {(): 1}
        await stream.aclose()
        for _ in range(3):
            await replica.check_health()

    found = {name: metric.values for name, metric in Metric.made.items()}
    asyncio.run(serve())
    served = replica.engine.batcher.served()
    assert found["dicompile_steps"] == {(kind,): count for kind, count in served.steps.items()}
    assert sum(served.steps.values()) == STEPS + 1
    assert found["dicompile_requests"] == {("finished",): 1, ("cancelled",): 1}
    assert found["dicompile_request_seconds"] == {("balanced",): 1}
    assert (found["dicompile_cache_bytes"][()], found["dicompile_open_requests"][()]) == (0, 0)
    assert asyncio.run(replica.served())["replica"] == "one"


def test_serve_run_tells_replicas_what_it_was_told(app: ModuleType) -> None:
    told, given = app.app({"replicas": "2", "threads": "1", "backend": "eager"})
    assert told["num_replicas"] == 2
    assert given == {"threads": 1, "options": {"backend": "eager"}}
    assert app.app({})[1] == {"threads": 0, "options": {"backend": "inductor"}}


def test_orders_are_checked_before_anything_runs(app: ModuleType) -> None:
    for wrong in ({"tier": "free"}, {"label": 150}, {"steps": 0}, {"timeout": 0}):
        with pytest.raises(ValueError, match="validation error"):
            order(app, **wrong)
    assert torch.is_tensor(next(replica_of(app).engine.open(app.Order(1, steps=1))[1]))
