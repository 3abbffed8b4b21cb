"""Load on the example from this machine: cancellations, a dead replica, every picture held against its single run.

    python load_test.py                                   # needs 'dicompile[serve]'

Three rounds: with batches, cancellations and the death of a replica; then with and without batches, undisturbed. Then
what clients and operators meet at the edges: previews, orders that take too long, too many orders, health and metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import random
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from app import Pictures
from engine import TIERS, Engine, Order, png, sampled
from PIL import Image
from ray import serve

import dicompile
from dicompile.demo.sample import load_model, load_scheduler

PORT = 8000
TRIES = 20
ROUNDS = {"disturbed": ((1, 2, 4, 8), True), "batches": ((1, 2, 4, 8), False), "no-batches": ((1,), False)}
"""Sizes of batches, and whether clients hang up and a replica dies."""
EDGES = "edges"
NEAR = 2
"""Grey levels by which a picture may differ from its single run: products of more rows round in another way."""


@dataclass
class Round:
    """What came back.

    Attributes:
        files: PNG of every order that was finished.
        seconds: that each of them took.
        cancelled: orders whose client hung up.
        again: tries that failed, and were made anew.
        wall: seconds of the round.
    """

    files: dict[Order, bytes] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cancelled: int = 0
    again: int = 0
    wall: float = 0.0


def ordered(order: Order, hang_up: float | None, done: Round) -> None:
    """One client: it orders a picture, tries again where a replica died, or hangs up after some seconds."""
    content = b""
    for _ in range(TRIES):
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=hang_up or 300)
        start = time.monotonic()
        try:
            connection.request("POST", "/pictures", json.dumps(vars(order)), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except TimeoutError:
            done.cancelled += 1
            return
        except (OSError, http.client.HTTPException):
            response = None
        finally:
            connection.close()
        if response is not None and response.status == 200:
            done.files[order] = content
            done.seconds.append(time.monotonic() - start)
            return
        done.again += 1
        time.sleep(0.5)
    raise RuntimeError(f"{order} was not served in {TRIES} tries; the last answer was {content!r}")


def loaded(orders: Sequence[Order], at_once: int, *, is_disturbed: bool) -> Round:
    """All orders, so many at a time; disturbed, every tenth client hangs up, and a replica dies in the middle."""
    chance, done, start = random.Random(0), Round(), time.monotonic()
    with ThreadPoolExecutor(at_once) as clients:
        futures = []
        for i, order in enumerate(orders):
            hang_up = chance.uniform(0.05, 0.6) if is_disturbed and chance.random() < 0.1 else None
            futures.append(clients.submit(ordered, order, hang_up, done))
            if is_disturbed and i == len(orders) // 2:
                futures.append(clients.submit(kill_when, futures[i // 2]))
        for future in futures:
            future.result()
    done.wall = time.monotonic() - start
    return done


def kill_when(before: Any) -> None:
    """Kill a replica when some order was served."""
    with contextlib.suppress(Exception):
        before.result()
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "Pictures" in actor["name"]]
    ray.kill(ray.get_actor(names[0], namespace="serve"))


def left_behind(replicas: int) -> list[dict[str, Any]]:
    """What every replica says of itself when nobody orders anything."""
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 180  # one that died comes back, and warms up
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            connection.request("GET", "/served")
            served = json.loads(connection.getresponse().read())
            found[served["replica"]] = served
        connection.close()
        if len(found) == replicas and not any(served["open"] for served in found.values()):
            break
        time.sleep(0.1)
    return list(found.values())


def run_alone(orders: Sequence[Order], threads: int) -> dict[Order, bytes]:
    """The picture of every order, each by itself, by `dicompile.optimize` alone."""
    torch.set_num_threads(threads)
    files = {}
    for tier, policy in TIERS.items():
        scheduler = load_scheduler()
        model = dicompile.optimize(load_model(), policy, schedule=scheduler, backend="eager")
        for order in orders:
            if order.tier == tier:
                *_, picture = sampled(model, scheduler, order)
                files[order] = png(picture)
    return files


def started(replicas: int, sizes: Sequence[int]) -> None:
    """The service, on this machine."""
    application = Pictures.options(num_replicas=replicas, ray_actor_options={"num_cpus": 0.5}).bind(
        threads=1, backend="eager", sizes=tuple(sizes)
    )
    serve.run(application)


def differs(ours: bytes, theirs: bytes) -> int:
    """Most grey levels between two pictures."""
    first, second = (np.asarray(Image.open(io.BytesIO(file)), dtype=int) for file in (ours, theirs))
    return int(abs(first - second).max())


def batches(served: Sequence[dict[str, Any]]) -> Counter[int]:
    """Forwards of all replicas, by the number of requests in them."""
    return sum((Counter({int(size): n for size, n in each["batches"].items()}) for each in served), Counter())


def told(name: str, done: Round, ran: Counter[int]) -> str:
    """One line of the table."""
    mean = sum(size * count for size, count in ran.items()) / sum(ran.values())
    return (
        f"| {name} | {len(done.files)} | {done.cancelled} | {done.again} | {len(done.files) / done.wall:.2f} | "
        f"{statistics.median(done.seconds):.2f} | {mean:.2f} |"
    )


def posted(order: Order, query: str = "", **more: Any) -> tuple[int, bytes]:
    """Status and content of the answer to an order."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    body = json.dumps(vars(order) | more)
    connection.request("POST", f"/pictures{query}", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def files_of(stream: bytes) -> list[bytes]:
    """What lies after each line of a stream with previews."""
    files = []
    while stream:
        length, _, rest = stream.partition(b"\n")
        files.append(rest[: int(length)])
        stream = rest[int(length) :]
    return files


def check_metrics(names: Sequence[str], replica: str, steps: int) -> None:
    """Check that Prometheus would read all of these here, and all steps of a replica, which Ray sends by and by."""
    port, absent, counted = ray.nodes()[0]["MetricsExportPort"], list(names), 0.0
    for _ in range(60):
        with contextlib.suppress(OSError):
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            absent = [name for name in names if name not in page]
            lines = [line for line in page.splitlines() if line.startswith("ray_dicompile_steps") and replica in line]
            counted = sum(float(line.split()[-1]) for line in lines)
            if not absent and counted == steps:
                return
        time.sleep(1)
    raise AssertionError(f"{absent} are not among the metrics at port {port}, or {counted:g} steps are not {steps}")


def edges() -> None:
    """Previews, time-outs, too many orders for the memory and for the queue, health, metrics."""
    engine = Engine(sizes=(1,), backend="eager")
    engine.warm_up()
    memory = engine.batcher.served().most_reserved_bytes  # of one order of the tier that needs most
    order = Order(7, seed=1, steps=8, tier="fast")
    request, pictures = engine.open(order)
    with request:
        files = [png(picture) for picture in pictures]
    deployment = Pictures.options(max_ongoing_requests=4, max_queued_requests=2, ray_actor_options={"num_cpus": 0.5})
    serve.run(deployment.bind(threads=1, backend="eager", sizes=(1,), most_queued=1, max_cache_bytes=memory))

    status, stream = posted(order, "?previews=3")
    shown = [differs(ours, files[step]) for ours, step in zip(files_of(stream), (2, 5, 7), strict=True)]
    assert (status, max(shown) <= NEAR) == (200, True), (status, shown)
    status, content = posted(order, timeout=0.01)
    assert status == 503 and b"took longer" in content, (status, content)
    with ThreadPoolExecutor(24) as clients:
        statuses = Counter(status for status, _ in clients.map(lambda _: posted(order), range(24)))
    assert statuses.keys() == {200, 429, 503}, statuses
    (served,) = left_behind(1)
    assert not any(served[name] for name in ("open", "waiting", "cache_bytes", "reserved_bytes")), served
    health = serve.status().applications["default"].deployments["Pictures"].status
    assert health == "HEALTHY", health
    names = ("steps", "requests", "cache_bytes", "open_requests", "request_seconds")  # no batches, and no captures
    steps = sum(served["steps"].values())
    check_metrics([f"dicompile_{name}" for name in names], served["replica"], steps)
    print(f"edges: {len(shown)} previews, {dict(statuses)}, {health}, {steps} steps in the metrics")
    serve.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--undisturbed", type=int, default=None, help="orders of the other rounds; all by default")
    parser.add_argument("--rounds", nargs="+", choices=[*ROUNDS, EDGES], default=[*ROUNDS, EDGES])
    arguments = parser.parse_args()
    chance = random.Random(1)
    orders = [
        Order(chance.randrange(150), seed, chance.randint(arguments.steps - 4, arguments.steps), tier)
        for seed, tier in enumerate(chance.choices([*TIERS], k=arguments.requests))
    ]
    alone = run_alone(orders, threads=1)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    lines = ["| round | finished | cancelled | tried again | pictures a second | median s | requests a batch |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in [name for name in ROUNDS if name in arguments.rounds]:
        sizes, is_disturbed = ROUNDS[name]
        started(arguments.replicas, sizes)
        some = orders if is_disturbed else orders[: arguments.undisturbed]
        before = batches(left_behind(arguments.replicas))
        done = loaded(some, arguments.at_once, is_disturbed=is_disturbed)
        served = left_behind(arguments.replicas)
        worst = max(differs(file, alone[order]) for order, file in done.files.items())
        kept = [(each["open"], each["waiting"], each["cache_bytes"], each["reserved_bytes"]) for each in served]
        lines.append(told(name, done, batches(served) - before))
        print(f"{name}: at most {worst} grey levels from single runs; open, waiting, bytes held, reserved: {kept}")
        assert worst <= NEAR, f"a picture differs by {worst} grey levels from its single run"
        assert len(done.files) + done.cancelled == len(some)
        assert len(kept) == arguments.replicas and not any(any(each) for each in kept), "something was left behind"
        serve.shutdown()
    if EDGES in arguments.rounds:
        edges()
    ray.shutdown()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
