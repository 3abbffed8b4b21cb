"""Compilation by other processes, one for each core: what takes long happens there, and nothing of it touches this one.

No thread of this process could do it. Whoever compiles traces, and tracing changes Python for all threads for a while:
torch.fx replaces ``nn.Module.__call__``, and compiled functions of anybody refuse to be called (torch 2.11 to 2.14).

A worker gets a graph without weights, compiles it, and leaves the code in Inductor's caches on disk, out of which this
process loads it in milliseconds. So nothing depends on workers but time: what one could not compile is compiled here.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler
from torch.fx._graph_pickler import Options as PicklerOptions
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dicompile.garbage import uncollected
from dicompile.latest import Latest
from dicompile.text import layout_text

if TYPE_CHECKING:
    from torch._inductor.compile_worker.subproc_pool import SubprocPool

log = logging.getLogger("dicompile")

Compile = Callable[[fx.GraphModule, Sequence[Any], FakeTensorMode], object]


@dataclass(frozen=True)
class Request:
    """A graph that Inductor is asked to compile, and everything that decides what is made of it.

    Attributes:
        graph: the graph, and examples of its inputs, as bytes.
        config: options of Inductor.
        precision: of float32 products, and of those on CUDA.
        is_deterministic: whether operators have to be.
        threads: that code for a CPU uses.
        text: all of that, for `name`.
    """

    graph: bytes
    config: dict[str, Any]
    precision: tuple[str, str]
    is_deterministic: bool
    threads: int
    text: str

    @classmethod
    def of(cls, graph_module: fx.GraphModule, arguments: Sequence[Any], mode: FakeTensorMode) -> Request | None:
        """Request what would be compiled now; None for a graph that cannot be written down."""
        bare = fx.Graph()
        bare.output(bare.graph_copy(graph_module.graph, {}))
        for node in bare.nodes:
            node.meta.clear()
        with mode:
            alike = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
                if isinstance(value, Tensor) else value
                for value in arguments
            ]  # fmt: skip
        try:
            graph = GraphPickler.dumps((fx.GraphModule(nn.Module(), bare), alike), PicklerOptions(ops_filter=None))
        except Exception as error:  # whatever pickle meets
            log.info("compiled here, and by no worker: %s", error)
            return None
        config = torch._inductor.config.save_config_portable()
        settings = (
            (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        )
        text = [torch.__version__, bare, *map(layout_text, alike), sorted(config.items()), *settings]
        return cls(graph, config, *settings, "\n".join(map(str, text)))

    @functools.cached_property
    def name(self) -> str:
        """Equal for what is the same in another process, too."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def is_known(self) -> bool:
        """True if it was compiled with these caches before."""
        return self._note.exists()

    def note(self) -> None:
        """Remember that it was compiled, here or elsewhere."""
        self._note.parent.mkdir(parents=True, exist_ok=True)
        self._note.touch()

    @property
    def _note(self) -> Path:
        return Path(cache_dir()) / "dicompile" / self.name


@uncollected()
def compile_here(request: Request, compile_: Compile) -> None:
    """Compile what was asked for; runs in a worker."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    loaded: Any = GraphPickler.loads(request.graph, mode)
    precision, on_cuda = request.precision
    if torch.get_float32_matmul_precision() != precision:  # saying so once more is another setting
        torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.fp32_precision = on_cuda
    torch.use_deterministic_algorithms(request.is_deterministic)
    torch.set_num_threads(request.threads)
    with torch._inductor.config.patch({**request.config, "compile_threads": 1}):
        graph_module, arguments = loaded
        compile_(graph_module, arguments, mode)
    request.note()


def count_workers() -> int:
    """Number of workers: as many as Inductor may use threads to compile."""
    return max(1, torch._inductor.config.compile_threads or 1)


_ASKED: Latest[Future[None]] = Latest(1024)
"""What was asked for, by name."""


@functools.cache
def _pool() -> SubprocPool:
    from torch._inductor.compile_worker.subproc_pool import SubprocPool  # and with it much of Inductor

    pool = SubprocPool(count_workers())
    atexit.register(pool.shutdown)
    return pool


_OF_PARENTS: list[SubprocPool] = []
"""Pools of the processes that this one was forked from: they are theirs to end."""


def _leave_pool() -> None:
    """Forget the pool that a fork has inherited: it has the pipes, but no thread that reads them."""
    if _pool.cache_info().currsize:
        pool = _pool()
        atexit.unregister(pool.shutdown)
        _OF_PARENTS.append(pool)
    _pool.cache_clear()
    _ASKED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_pool)


def ask(requests: Sequence[Request], compile_: Compile) -> list[Future[None]]:
    """Let workers compile what was not compiled before.

    Args:
        requests: what is wanted.
        compile_: a function of a module, which a worker imports.
    """
    wanted = {request.name: request for request in requests if not request.is_known}
    config: Any = torch._inductor.config
    if wanted and (config.force_disable_caches or not config.fx_graph_cache):
        log.warning("Inductor's caches are switched off: everything is compiled in this process")
        return []
    try:
        futures = []
        for name, request in wanted.items():
            future = _ASKED.get(name)
            if future is None or future.done():
                future = _ASKED.put(name, _pool().submit(compile_here, request, compile_))
            futures.append(future)
        return futures
    except (OSError, RuntimeError) as error:
        log.warning("no process can be started, everything is compiled in this one: %s", error)
        _pool.cache_clear()
        return []
