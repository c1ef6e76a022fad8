"""Groups of gloo ranks for tests: a fork server that has imported all they need starts one in a few milliseconds."""
from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

_context = get_context("forkserver")
PRELOADED = [
    "torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "torch.distributed.pipelining", "torch._dynamo", "pytest", "stepladder.parallel.optimizer",
    "stepladder.parallel.checkpoint", "stepladder.launch.train", "stepladder.model.token.attention",
    "stepladder.model.token.gla", "stepladder.model.channel.moe", "stepladder.model.channel.swiglu"]


def preload(*modules: str) -> None:
    """What all ranks have imported; more is added before the first of them starts, by conftest.py the tests' own files.

    A module that cannot be imported is skipped without a word, and every rank then imports it on its own.
    """
    PRELOADED.extend(modules)


@cache
def serve() -> None:
    """Starts the server, before another does that has imported nothing: a process has one. It looks for modules as a
    new Python does: here too only if PYTHONPATH says so."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    _context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
        forkserver.ensure_running()


def process(target: Callable[..., Any], *args: Any) -> ForkServerProcess:
    """A process to start that has imported everything. No daemon: it may start data workers."""
    serve()
    return _context.Process(target=_begin, args=(target, args))


def _begin(target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()             # the server's objects: each collection would walk through all of them, and copy their pages
    target(*args)


os.environ.setdefault("OMP_NUM_THREADS", "1")            # read by the server's OpenMP; busy pools thrash two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class RankFailed(AssertionError):
    pass


def run(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """fn(rank, n, *args) in n processes with a gloo group; their results by rank. A hang is a failure too."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(n):
            ours, theirs = _context.Pipe(duplex=False)
            p = process(_rank, theirs, rank, n, Path(folder) / "rendezvous", fn, args)
            p.start()
            theirs.close()
            pipes.append(ours)
            ranks.append(p)
        try:
            return _collect(pipes, timeout)
        finally:
            for p in ranks:
                p.kill()
                p.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(results) < len(pipes):
        left = [p for i, p in enumerate(pipes) if i not in results]
        ready = wait(left, max(0.0, end - time.monotonic()))
        if not ready:
            missing = [i for i in range(len(pipes)) if i not in results]
            raise RankFailed(f"ranks {missing} said nothing for {timeout:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # pyright: ignore[reportArgumentType]
            try:
                ok, value = pipe.recv()  # pyright: ignore[reportAttributeAccessIssue]
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if not ok:
                raise RankFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[i] for i in range(len(pipes))]


def _rank(pipe: Connection, rank: int, n: int, rendezvous: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch  # here: the parent of most tests has no need of it yet
    import torch.distributed as dist
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n)
        value = fn(rank, n, *args)
        dist.barrier()
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)                                       # gloo's threads may wait for a rank that failed
