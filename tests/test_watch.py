"""Ranks that differ, hang or die are named, and the others end: with gloo, on processes that really do these things."""
from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist

from stepladder.launch import cli, stop, world
from stepladder.launch.stop import Stop
from stepladder.parallel.build import build
from stepladder.parallel.checkpoint import Ranks
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel
from stepladder.parallel.watch import BEAT, EXIT, HELD, LISTEN, SURE, LostRank, Process, Watch, watch

CPU = torch.device("cpu")
LIMIT = 3.0
GUILTY = "rank 1 (pp 0, dp 0, tp 1, ep 0)"


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def ends(n: int, fn: Callable[..., None], folder: Path, *args: Any, init: str = "") -> dict[int, tuple[int, str]]:
    """fn(rank, n, *args) in n processes that end as they like: exit code and last words of all that do within 30 s."""
    init = init or f"file://{folder / 'rendezvous'}"
    processes = [ranks.process(_rank, rank, n, fn, folder, init, args) for rank in range(n)]
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
    time.sleep(1)                                     # it is in step 2 for as long as a step takes
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise ValueError("shard 7 is torn")


def test_a_rank_that_sleeps_is_named_with_step_block_and_collective(tmp_path: Path) -> None:
    found = ends(4, train, tmp_path, 1, sleeps)
    assert found.keys() == {0, 1, 2, 3}               # in half a minute: the sleeping one does not get on either
    cause = f"{GUILTY} never came, it is in step 2 after the all-reduce of blocks.0.token"
    assert all(code != 0 and cause in said for code, said in found.values()), found
    first = [said for rank, (code, said) in found.items() if code == EXIT and rank != 1]
    assert first                                     # the others may learn it from a connection that breaks
    waited = r"waited [2-9] s in step 2 for the all-reduce of blocks\.1\.token: rank 1"
    assert all(re.search(waited, said) for said in first), first
    assert all(said.count("\n") == 1 for said in first)
    if found[2][0] == EXIT:
        assert found[2][1].startswith("stepladder: rank 2 (pp 0, dp 1, tp 0, ep 0) waited")


def test_collectives_that_nobody_tracks_are_covered_by_the_step(tmp_path: Path) -> None:
    found = ends(2, train, tmp_path, 1, sleeps, False)
    for code, said in found.values():
        assert code != 0
        assert ": rank 0 in step 2, parallel/checkpoint.py:" in said
        assert "; rank 1 in step 2\n" in said         # it sleeps in this file, not in the package's
    assert any("waited 3 s in step 2 without progress: rank 0" in said for code, said in found.values() if code == EXIT)


def passes(rank: int, n: int, layout: Parallel, block: str) -> None:
    """A step of a real model; rank 1 falls asleep in a block that it holds."""
    mesh = Mesh(layout, CPU, rank, n)
    parts = build(tiny.config(), mesh, seed=0)
    if rank == 1:
        (held,) = (b for decoder in parts.decoders for name, b in decoder.blocks.items() if name == block)
        held.channel.register_forward_pre_hook(lambda *_: sleeps())
    with watch.over(mesh, store(), LIMIT):
        watch.step(1)
        parts.pipe([tiny.micro(2, 8) for _ in range(4)])


def test_a_hang_of_fsdp_names_whose_weights_are_waited_for(tmp_path: Path) -> None:
    code, said = ends(2, passes, tmp_path, Parallel(), "1")[0]
    assert code != 0                                  # it may see rank 1 end first, whose limit it is, too
    assert "in step 1 " in said
    assert " after the all-gather of blocks.2.token's weights: rank 1 (" in said
    assert "never came, it is in step 1 after the all-gather of blocks.1.channel's weights" in said


def test_a_hang_of_a_pipeline_names_stage_and_micro_batch(tmp_path: Path) -> None:
    code, said = ends(2, passes, tmp_path, Parallel(pp=2), "2")[0]
    assert code != 0
    assert " after the transfer of gradients to stage 0 of micro-batch 0: " in said
    assert "rank 1 in step 1 after the transfer of activations to stage 1 of micro-batch 0" in said


def test_a_killed_rank_is_named_by_the_others(tmp_path: Path) -> None:
    found = ends(3 * 2, train, tmp_path, 1, dies)
    assert found.pop(1)[0] == -signal.SIGKILL
    assert len(found) >= 4
    for code, said in found.values():
        assert code != 0
        assert f"{GUILTY} has been silent for " in said
        assert "last heard of in step 2" in said


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


def alarmed(rank: int, n: int) -> None:
    with watch.over(Mesh(Parallel(), CPU, rank, n), store(), 10 * LIMIT):
        watch.pause = 0.3
        watch.step(1)
        (raises if rank == 1 else sleeps)()


def test_nobody_waits_for_the_limit_when_a_rank_has_said_that_it_stopped(tmp_path: Path) -> None:
    code, said = ends(2, alarmed, tmp_path)[0]
    assert code == EXIT
    assert "rank 0 (pp 0, dp 0, tp 0, ep 0) waited " in said
    assert said.endswith("without progress: rank 1 (pp 0, dp 1, tp 0, ep 0) stopped: shard 7 is torn\n")


def clogged(rank: int, n: int) -> None:
    """Rank 1 dies while rank 2 is in a call of C that keeps the lock of its interpreter, so that no thread can beat."""
    x = torch.ones(4)
    with watch.over(Mesh(Parallel(), CPU, rank, n), store(), 20 * LIMIT):
        watch.step(1)
        dist.all_reduce(x)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 2:
            ctypes.PyDLL(None).usleep(int(1e6 * (SURE + 0.5)))
        dist.recv(x, 1)


def test_a_rank_that_says_nothing_for_a_while_is_not_blamed_for_the_death_of_another(tmp_path: Path) -> None:
    found = ends(3, clogged, tmp_path)
    assert found.pop(1)[0] == -signal.SIGKILL
    assert found.keys() == {0, 2}
    for _, said in found.values():
        assert "rank 1 (pp 0, dp 1, tp 0, ep 0) has been silent for " in said
        assert "rank 2 (pp 0, dp 2, tp 0, ep 0) has been silent for " not in said


def test_when_a_connection_breaks_the_one_that_is_gone_is_known_long_before_it_could_be_called_silent() -> None:
    """Others that would not beat for long hear of it, and say quickly that they live."""
    words, three = dist.HashStore(), [Watch() for _ in range(3)]
    for rank, w in enumerate(three):
        w.start(Mesh(Parallel(), CPU, rank, 3), words, 60)
        w.pause = 3 * BEAT
        w.leaving = True                              # it may judge, not end this process
    three[1].ended.set()                              # it says nothing more
    began, broken = time.monotonic(), RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    try:
        cause = three[0]._cause(broken)
        assert cause is not None
        assert cause.startswith("rank 1 (pp 0, dp 1, tp 0, ep 0) has been silent for ")
        assert "; rank" not in cause
        assert time.monotonic() - began < 2 * BEAT
        three[0].stop(cause)
        began = time.monotonic()
        assert three[2]._cause(broken) == cause       # which need not find out by itself
        assert time.monotonic() - began < BEAT + SURE
    finally:
        for w in three:
            w.stop("")


def test_a_lost_rank_has_an_exit_code_of_its_own(monkeypatch, capsys) -> None:
    def lose(_: Any) -> None:
        raise LostRank("rank 0 lost the others")

    monkeypatch.setattr(cli, "parse", lambda _: SimpleNamespace(program=lose))
    assert cli.main([]) == EXIT
    assert capsys.readouterr().err == "stepladder: rank 0 lost the others\n"


def test_an_error_of_this_rank_alone_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        with Watch().over(Mesh(Parallel(), CPU), dist.HashStore(), 60):
            raise RuntimeError("out of memory")


def waits_in_silence(rank: int, n: int, guilty: int, apart: bool, pause: float) -> None:
    """As over NCCL, where no connection breaks. The last rank is torchrun, too: one dies, and it ends the others."""
    stop.SOON = timedelta(seconds=0.3)
    asked = Stop()
    asked.meet(store(), rank, n, 1)
    if apart:                                         # of each other's processes they know nothing
        here = Process.this()._replace(home=f"{rank}")
        Process.this = staticmethod(lambda: here)  # pyright: ignore[reportAttributeAccessIssue]
    with watch.over(Mesh(Parallel(), CPU, rank, n), store(), 100 * LIMIT):
        watch.pause = pause
        watch.step(1)
        store().set(f"process/{rank}", str(os.getpid()))
        if rank == n - 1:
            processes = [int(store().get(f"process/{r}")) for r in range(n)]
            os.kill(processes.pop(guilty), signal.SIGKILL)
            for process in processes:
                os.kill(process, signal.SIGTERM)
        sleeps()


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_killed_rank_is_named_where_no_connection_breaks_but_its_launcher_ends_the_others(tmp_path: Path, guilty: int
                                                                                            ) -> None:
    found = ends(3, waits_in_silence, tmp_path, guilty, True, 0.3)
    assert found.pop(guilty)[0] == -signal.SIGKILL
    assert len(found) == 2
    for code, said in found.values():
        assert code == EXIT
        assert re.search(rf": rank {guilty} \(pp 0, dp {guilty}, tp 0, ep 0\) has been silent for \d+ s, last", said)


@pytest.mark.parametrize("guilty", [0, 1])
def test_on_one_machine_it_is_known_without_listening(tmp_path: Path, guilty: int) -> None:
    """With beats so rare that it is not done in time if anybody listens to some."""
    found = ends(3, waits_in_silence, tmp_path, guilty, False, 4 * BEAT)
    assert found.pop(guilty)[0] == -signal.SIGKILL
    assert len(found) == 2
    for code, said in found.values():
        assert code == EXIT
        assert f": rank {guilty} (pp 0, dp {guilty}, tp 0, ep 0) has been silent for " in said
        assert " s, its process has ended, last heard of " in said


def test_a_rank_that_has_come_to_its_end_is_not_taken_for_dead() -> None:
    """It left, and its process ends before others have drawn their timelines; one of these does not answer."""
    words, three = dist.HashStore(), [Watch() for _ in range(3)]
    gone = subprocess.Popen(["true"])
    process = Process.this()._replace(pid=gone.pid, born=1)
    gone.wait()
    try:
        for rank, w in enumerate(three):
            w.start(Mesh(Parallel(), CPU, rank, 3), words, 60)
            w.leaving = True
        three[1].process = process
        three[1].stop("rank 1 has come to its end", alarm=False)
        listens = SimpleNamespace(wait=lambda _: three[2]._say(), is_set=lambda: False, set=lambda: None)
        with mock.patch.object(three[0], "ended", listens):
            three[0].suspect([2])
        assert not three[0].store.check(["alarm"])
        three[1].process = process
        three[1]._say()                               # as if it had not left
        three[0].suspect([2])
        assert three[0].store.check(["alarm"])
    finally:
        for w in three:
            w.stop("")


def test_a_rank_that_does_not_answer_but_beats_is_not_suspected_for_long() -> None:
    """It may load a checkpoint."""
    words, pair = dist.HashStore(), (Watch(), Watch())
    try:
        for rank, w in enumerate(pair):
            w.start(Mesh(Parallel(), CPU, rank, 2), words, 60)
            w.leaving = True
        listens = lambda speaks: SimpleNamespace(wait=lambda _: speaks(), is_set=lambda: False, set=lambda: None)
        with mock.patch.object(pair[0], "ended", listens(pair[1]._say)):
            pair[0].suspect([1])
        assert not pair[0].store.check(["alarm"])
        pair[1].ended.set()
        pair[1].thread.join()
        with mock.patch.object(pair[0], "ended", listens(lambda: None)):
            pair[0].suspect([1])
        assert pair[0].store.check(["alarm"])
        assert pair[0].store.get("left").decode().startswith("rank 1 (pp 0, dp 1, tp 0, ep 0) has been silent for ")
    finally:
        for w in pair:
            w.stop("")


@pytest.mark.parametrize(("times", "gone"), [(1.9, False), (2.1, True)])
def test_a_rank_that_is_only_suspected_has_twice_as_long_to_beat_as_others(times: float, gone: bool) -> None:
    """It beats again after so many times as long, on a clock that runs only while it is listened to."""
    words, pair = dist.HashStore(), (Watch(), Watch())
    for rank, w in enumerate(pair):
        w.start(Mesh(Parallel(), CPU, rank, 2), words, 60)
        w.ended.set()                                 # their own threads would beat
        w.thread.join()
    pair[0].ended = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        wait=lambda seconds: seconds > times * LISTEN * BEAT and pair[1]._say())
    pair[0].suspect([1])
    assert pair[0].store.check(["alarm"]) is gone


class Handle:
    """A collective that is complete when told so."""

    def __init__(self, done: bool = False):
        self.done = done

    def is_completed(self) -> bool:
        return self.done


def watching(limit: float = 60) -> Watch:
    w = Watch()
    w.start(Mesh(Parallel(), CPU), dist.HashStore(), limit)
    return w


def test_more_collectives_than_are_held_are_known_by_their_neighbours() -> None:
    """A device that is behind: the oldest handles are held, later ones are skipped until one of these is complete."""
    w, handles = watching(), [Handle() for _ in range(3 * HELD)]
    try:
        for i, handle in enumerate(handles):
            w.track(handle, "sum", f"blocks.{i}")  # pyright: ignore[reportArgumentType]
        assert w._range(w._oldest()[0]) == "the sum of blocks.0"  # pyright: ignore[reportOptionalSubscript]
        for handle in handles[:-1]:
            handle.done = True
        assert w._oldest() is None                    # the last one is not held: only the step can miss it
        last = Handle()
        w.track(last, "sum", "head")  # pyright: ignore[reportArgumentType]
        n = 3 * HELD
        assert w._range(w._oldest()[0]) == (  # pyright: ignore[reportOptionalSubscript]
            f"the sum of head or one of the {n - HELD} before it, from the sum of blocks.{HELD} on")
    finally:
        w.stop("")


def test_complete_collectives_are_forgotten_with_the_step() -> None:
    """A handle keeps its output in memory."""
    w = watching()
    try:
        for _ in range(3):
            w.track(Handle(True), "sum", "x")  # pyright: ignore[reportArgumentType]
        assert len(w.held) == 3
        w.step(1)
        assert not w.held
    finally:
        w.stop("")


@pytest.mark.parametrize(("on", "most"), [(True, 3e-6), (False, 1e-6)])
def test_following_a_collective_costs_next_to_nothing(on: bool, most: float) -> None:
    w, work, n = watching() if on else Watch(), Handle(True), 5000
    took = []
    for _ in range(7):                                # the quickest: two cores are shared with other things
        began = time.perf_counter()
        for _ in range(n):
            w.track(work, "all-reduce", "blocks.3.token")  # pyright: ignore[reportArgumentType]
        took.append((time.perf_counter() - began) / n)
    w.stop("")
    assert min(took) < most


def test_only_a_watch_that_rests_waits_longer_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    w = watching(1.0)
    try:
        with w.rest():
            time.sleep(1.5)
            assert not codes
        end = time.monotonic() + 30
        while not codes and time.monotonic() < end:
            time.sleep(0.01)
        assert codes[0] == EXIT
    finally:
        w.stop("")


def test_a_step_that_begins_is_told_before_the_next_beat() -> None:
    """Whoever dies in it was heard of in it."""
    w, began = watching(), time.monotonic()
    try:
        w.step(7)
        while w._read()[0].step != 7:
            assert time.monotonic() - began < 0.8 * BEAT
            time.sleep(0.05)
    finally:
        w.stop("")


def test_ranks_that_listen_at_the_same_time_do_not_take_each_other_for_silent() -> None:
    words, pair = dist.HashStore(), (Watch(), Watch())
    for rank, w in enumerate(pair):
        w.start(Mesh(Parallel(), CPU, rank, 2), words, 1.0)
        w.ended.set()                                 # their own threads would beat
        w.thread.join()
        w.ended = threading.Event()
    alone = pair[0]._others()
    assert alone.startswith("rank 1 (pp 0, dp 1, tp 0, ep 0) has been silent for ")
    assert " s, last heard of before its first step, " in alone
    with ThreadPoolExecutor(2) as pool:
        assert not any("silent" in said for said in pool.map(Watch._others, pair))


# What torch does not promise

def private(rank: int, n: int) -> float:
    mesh = Mesh(Parallel(tp=2), CPU, rank, n, timedelta(seconds=0.2))
    group = mesh.group("tp")
    met = world.World(rank, n, rank, "given").meet()
    assert met is not None
    met.set(f"hello/{rank}", "x")
    met.wait([f"hello/{r}" for r in range(n)])
    began = time.monotonic()
    if rank == 0:                                     # rank 1 does not come
        with pytest.raises(RuntimeError, match="imed out"):
            dist.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - began


def test__get_default_store_and__set_pg_timeout() -> None:
    """Ranks that share a store of their group; a group's collectives that end when the mesh says."""
    assert ranks.run(4, private, timeout=20)[0] < 5


def test_store_clone_is_another_connection_to_the_same_words() -> None:
    a = dist.TCPStore("127.0.0.1", 0, is_master=True)
    a.clone().set("x", "1")  # pyright: ignore[reportAttributeAccessIssue]
    assert a.get("x") == b"1"
