"""The demo model behind Ray Serve.

    serve run app:app                # in this folder; with replicas=2, say, or backend=eager
    curl localhost:8000/pictures --json '{"label": 7, "tier": "fast"}' -o picture.png

POST /pictures answers with a PNG; with `previews=4` as a query it streams one every four steps, each after a line with
its length; a line that begins with ! ends a stream early, and says why. A client that hangs up, or an order that takes
too long, frees what it held at once. Where too many wait the answer is 429 (this replica's memory) or 503 (Serve's own
queue).
"""

# No postponed annotations: FastAPI would look for the names of a class that Ray sends to its replicas.

import asyncio
import contextlib
import time
from collections import Counter as Counts
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from engine import TIERS, Engine, Order, png
from fastapi import FastAPI, HTTPException, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import metrics

from dicompile.errors import RequestTimedOut

MOST_AT_ONCE = 32
"""Orders that a replica takes; more of them wait in Serve's queue."""
MOST_QUEUED = 16
"""Those of them that may wait for memory."""
STUCK = 60.0
"""Seconds without a forward, while calls wait, after which a replica is taken for broken."""

api = FastAPI()


class Wanted(BaseModel):
    """An order, as clients send it."""

    label: int = Field(ge=0, lt=150)
    seed: int = 0
    steps: int = Field(20, ge=1, le=100)
    tier: str = Field("balanced", pattern="|".join(TIERS))
    timeout: float = Field(60.0, gt=0)


class Gauges:
    """What a `Batcher` has done, as metrics that Ray exports for Prometheus."""

    def __init__(self) -> None:
        self._steps = metrics.Counter("dicompile_steps", "Steps of requests.", tag_keys=("kind",))
        self._captures = metrics.Counter("dicompile_captures", "Batch sizes that were captured and compiled.")
        self._ended = metrics.Counter("dicompile_requests", "Requests that ended.", tag_keys=("how",))
        self._bytes = metrics.Gauge("dicompile_cache_bytes", "Bytes that open requests hold.")
        self._open = metrics.Gauge("dicompile_open_requests", "Requests that have not ended.")
        self._latency = metrics.Histogram(
            "dicompile_request_seconds", "Time from order to picture.", boundaries=[0.1, 0.3, 1, 3, 10, 30, 100],
            tag_keys=("tier",),
        )  # fmt: skip
        self._before: Counts[tuple[str, str]] = Counts()

    def update(self, engine: Engine) -> None:
        """Count what came since the last time."""
        served = engine.batcher.served()
        now: Counts[tuple[str, str]] = Counts({("steps", kind): count for kind, count in served.steps.items()})
        now["captures", ""] = served.captures
        for how in ("finished", "cancelled", "timed_out", "failed"):
            now["ended", how] = getattr(served, how)
        more, self._before = now - self._before, now
        for (what, which), count in more.items():
            if what == "steps":
                self._steps.inc(count, {"kind": which})
            elif what == "ended":
                self._ended.inc(count, {"how": which})
            else:
                self._captures.inc(count)
        self._bytes.set(served.cache_bytes)
        self._open.set(served.open)

    def took(self, seconds: float, tier: str) -> None:
        """An order was served."""
        self._latency.observe(seconds, {"tier": tier})


def _after(pictures: Iterator[torch.Tensor], steps: int) -> bytes:
    """The picture some steps further on."""
    for _ in range(steps):
        picture = next(pictures)
    return png(picture)


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=MOST_AT_ONCE,
    max_queued_requests=64,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=20,
)
@serve.ingress(api)
class Pictures:
    """A replica: one model, its `Batcher`, and a thread for every order.

    Args:
        threads: that torch computes with; 0 leaves it to torch.
        most_queued: orders that may wait for memory.
        options: of `Engine`.
    """

    def __init__(self, threads: int = 0, most_queued: int = MOST_QUEUED, **options: Any) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._most_queued = most_queued
        self._threads = ThreadPoolExecutor(MOST_AT_ONCE)  # those of asyncio are few: who waits would keep them from all
        self.engine, self.gauges = Engine(**options), Gauges()
        self.engine.warm_up()
        self._moved = time.monotonic(), 0

    @api.post("/pictures")
    async def picture(self, wanted: Wanted, previews: int = Query(0, ge=0)) -> Response:
        """A picture, or a stream of previews with the picture at the end."""
        if self.engine.batcher.served().queued >= self._most_queued:
            raise HTTPException(429, "too many orders wait for memory", {"Retry-After": "1"})
        if previews:
            return StreamingResponse(self._stream(wanted, previews), media_type="application/octet-stream")
        try:
            (picture,) = [file async for file in self._pictures(wanted, wanted.steps)]
        except RequestTimedOut as error:
            raise HTTPException(503, error.what, {"Retry-After": "1"}) from error
        return Response(picture, media_type="image/png")

    @api.get("/served")
    async def served(self) -> dict[str, Any]:
        """What this replica has done."""
        return vars(self.engine.batcher.served()) | {"replica": serve.get_replica_context().replica_id.unique_id}

    async def check_health(self) -> None:
        """Ray asks for it; raises where nothing has moved for too long although calls wait."""
        self.gauges.update(self.engine)
        served = self.engine.batcher.served()
        done = sum(served.batches.values())
        if done != self._moved[1] or not served.waiting:
            self._moved = time.monotonic(), done
        elif time.monotonic() - self._moved[0] > STUCK:
            raise RuntimeError(f"{served.waiting} calls wait, and nothing has run for {STUCK:g} s")

    async def _stream(self, wanted: Wanted, previews: int) -> AsyncIterator[bytes]:
        try:
            async with contextlib.aclosing(self._pictures(wanted, previews)) as pictures:
                async for file in pictures:
                    yield b"%d\n" % len(file) + file
        except RequestTimedOut as error:  # the answer has begun: its status cannot be another one any more
            yield b"! %s\n" % error.what.encode()

    async def _pictures(self, wanted: Wanted, every: int) -> AsyncGenerator[bytes, None]:
        """Files, every so many steps; a client that goes away cancels the request."""
        start = time.monotonic()
        order = Order(wanted.label, wanted.seed, wanted.steps, wanted.tier)
        request, pictures = self.engine.open(order, wanted.timeout)
        try:
            for step in range(every, wanted.steps + every, every):
                further = min(every, wanted.steps - step + every)
                yield await asyncio.get_running_loop().run_in_executor(self._threads, _after, pictures, further)
            request.close()
            self.gauges.took(time.monotonic() - start, wanted.tier)
        finally:
            request.cancel()  # nothing, where it was closed
            self.gauges.update(self.engine)


def app(args: dict[str, str]) -> serve.Application:
    """What `serve run app:app replicas=2 backend=eager` runs."""
    deployment = Pictures.options(num_replicas=int(args.get("replicas", 1)))
    return deployment.bind(int(args.get("threads", 0)), backend=args.get("backend", "inductor"))
