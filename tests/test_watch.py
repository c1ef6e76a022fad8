"""Ranks that differ, hang or die are named, and the others end: with gloo, on processes that really do these things."""
from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

from stepladder.parallel.checkpoint import Ranks
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel
from stepladder.parallel.watch import EXIT, Watch, watch

CPU = torch.device("cpu")
LIMIT = 2.0
GUILTY = "rank 1 (pp 0, dp 0, tp 1, ep 0)"


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def ends(n: int, fn: Callable[..., None], folder: Path, *args: Any, init: str = "") -> dict[int, tuple[int, str]]:
    """fn(rank, n, *args) in n processes that end as they like: exit code and last words of all that do within 30 s."""
    init = init or f"file://{folder / 'rendezvous'}"
    processes = [ranks._context.Process(target=_rank, args=(rank, n, fn, folder, init, args)) for rank in range(n)]
    for p in processes:
        p.start()
    end = time.monotonic() + 30
    for p in processes:
        p.join(max(0.0, end - time.monotonic()))
    done = {r: p.exitcode for r, p in enumerate(processes) if p.exitcode is not None}
    for p in processes:
        p.kill()
        p.join()
    return {r: (code, (folder / f"said-{r}").read_text()) for r, code in done.items()}


def _rank(rank: int, n: int, fn: Callable[..., None], folder: Path, init: str, args: tuple[Any, ...]) -> None:
    os.dup2(os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=n)
    fn(rank, n, *args)


def train(rank: int, n: int, guilty: int, crime: Callable[[], None], tracked: bool = True) -> None:
    """Three steps of two blocks; rank `guilty` does something else in the second block of step 2."""
    x, everyone = torch.ones(4), Ranks(None)
    with watch.over(Mesh(Parallel(tp=2), CPU, rank, n), store(), LIMIT):
        for step in range(1, 4):
            watch.step(step)
            for block in range(2):
                if (rank, step, block) == (guilty, 2, 1):
                    crime()
                if not tracked:
                    assert everyone.all(True)
                    continue
                work = dist.all_reduce(x, async_op=True)
                assert work is not None
                watch.track(work, "all-reduce", f"blocks.{block}.token").wait()


def sleeps() -> None:
    time.sleep(60)


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise ValueError("shard 7 is torn")


def test_a_rank_that_sleeps_is_named_with_step_block_and_collective(tmp_path: Path) -> None:
    began = time.monotonic()
    found = ends(4, train, tmp_path, 1, sleeps)
    assert time.monotonic() - began < LIMIT + 10
    assert found.keys() == {0, 1, 2, 3}               # the sleeping one does not get on either
    cause = f"{GUILTY} never came, it is in step 2 after the all-reduce of blocks.0.token"
    assert all(code != 0 and cause in said for code, said in found.values()), found
    first = [said for rank, (code, said) in found.items() if code == EXIT and rank != 1]
    assert first                                     # the others may learn it from a connection that breaks
    assert all("waited 2 s in step 2 for the all-reduce of blocks.1.token: rank 1" in said for said in first), first
    assert all(said.count("\n") == 1 for said in first)
    if found[2][0] == EXIT:
        assert found[2][1].startswith("stepladder: rank 2 (pp 0, dp 1, tp 0, ep 0) waited")


def test_collectives_that_nobody_tracks_are_covered_by_the_step(tmp_path: Path) -> None:
    found = ends(2, train, tmp_path, 1, sleeps, False)
    assert found[0][0] == EXIT
    assert "waited 2 s in step 2 without progress: rank 0 in step 2, parallel/checkpoint.py:" in found[0][1]
    assert found[0][1].endswith("; rank 1 in step 2\n")          # it sleeps in this file, not in the package's


def test_a_killed_rank_is_named_by_the_others(tmp_path: Path) -> None:
    found = ends(3 * 2, train, tmp_path, 1, dies)
    assert found.pop(1)[0] == -signal.SIGKILL
    assert len(found) >= 4
    for code, said in found.values():
        assert code != 0
        assert f"{GUILTY} has been silent for " in said
        assert "last heard of in step" in said


def test_the_rank_that_holds_the_store_is_named_when_it_dies(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    found = ends(2, train, tmp_path, 0, dies, init=f"tcp://127.0.0.1:{port}")
    assert found[1][0] != 0
    assert "the store, at rank 0 or its launcher, is gone too" in found[1][1]


def test_a_rank_that_stops_says_why_to_those_that_wait(tmp_path: Path) -> None:
    found = ends(2, train, tmp_path, 1, raises)
    assert f"lost the others in step 2 after the all-reduce of blocks.1.token: {GUILTY} stopped: shard 7 is torn" in \
        found[0][1]


def test_an_error_of_this_rank_alone_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        with Watch().over(Mesh(Parallel(), CPU), dist.HashStore(), 60):
            raise RuntimeError("out of memory")
