"""Faults injected for real into whole runs: each ends as documented, and started again the run has, bit for bit, the
losses of one that was never disturbed.

Where each lives, of those that are not in this file:

| fault | where |
|---|---|
| SIGKILL of a process alone, in a step and in a save | test_resume.py: test_a_killed_run_goes_on_bitwise |
| SIGKILL of a node under Slurm | test_slurm.py: test_a_disturbed_job_has_the_losses_of_an_undisturbed_run |
| SIGKILL of any rank, at random moments | soak.py (`make soak`) |
| a time limit, by Slurm's clock | test_slurm.py: test_a_time_limit_is_announced_by_the_clock_and_never_met |
| a network that is cut | test_slurm.py: test_ranks_whose_network_is_cut_end_and_go_on_when_it_is_back |
| a rank that sleeps or dies, and who is named | test_watch.py |
| a launcher that is killed | test_torchrun_goes_on_with_the_machines_that_are_left_and_the_same_batch, test_stop.py |
| a file that may not grow, in a save | test_bad_folders.py: test_a_full_disk_costs_a_checkpoint_and_not_the_run |
| a full disk of a cache | test_cache.py: test_a_full_disk_and_a_cache_that_is_gone_cost_the_cache_only |
| an unshared run folder | test_checkpoint_contents.py: test_a_run_folder_that_is_not_shared_is_a_failed_save |
| checkpoints damaged in other ways | test_checkpoint_store.py: test_a_damaged_checkpoint_is_passed_over_and_named |
| USR1, TERM: to one rank, to all, and Slurm's ways of sending them | test_events.py, test_stop.py, test_slurm.py |
| a node check cut off | test_slurm.py: test_a_check_that_says_nothing_or_is_cut_off_finds_no_node_unfit |
| gradients that stay non-finite | test_bad_folders.py: test_steps_that_stay_non_finite_stop_the_run_at_a_named_place |
| a corrupt shard that is skipped | test_loader.py: test_a_corrupt_shard_stops_the_run_or_is_skipped_and_counted |
| servers that are away, or gone | test_streaming.py: test_a_source_that_is_away_may_be_found_by_another_start |
| servers that fail for a while | test_streaming.py: test_a_source_that_fails_for_a_while_is_asked_again |
"""
from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ranks
from test_events import at_step
from test_resume import EVERY, STEPS, folder, records, train  # noqa: F401  the fixture: shards and run.toml
from test_streaming import Server
from test_watch import ends

from stepladder.data.loader import _Crew
from stepladder.data.manifest import Columns
from stepladder.data.shards import Corpus
from stepladder.launch import events, status
from stepladder.launch.stop import Stop
from stepladder.parallel.checkpoint import Store
from stepladder.parallel.optimizer import Optimizer, Report


def runs(rank: int, n: int, config: Path, run: Path, *more: str) -> int:
    return train(config, run, *more)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:  # noqa: F811
    """Losses of the run that nothing befalls, on one rank."""
    ranks.run(1, runs, folder / "run0.toml", folder / "alone")
    return losses(folder / "alone")


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[float]:  # noqa: F811
    """The same on two."""
    ranks.run(2, runs, folder / "run0.toml", folder / "pair")
    return losses(folder / "pair")


def losses(run: Path) -> list[float]:
    found = records(run)
    assert list(found) == list(range(1, STEPS + 1))
    return [r["loss"] for r in found.values()]


def faults(run: Path) -> list[str]:
    return [e["error"] for e in events.read(run) if e["event"] == "fault"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(60)


def victim(rank: int, n: int, config: Path, run: Path, crime: Callable[[], None]) -> None:
    """Rank 0, which holds the store and writes the log, does something else in the middle of step 5."""
    if rank == 0:
        at_step(5, crime)
    train(config, run, "train.collective_minutes=0.05")


@pytest.mark.parametrize("crime", [dies, hangs])
def test_rank_0_may_die_or_hang(folder: Path, pair: list[float], tmp_path: Path, crime: Callable[[], None]):  # noqa: F811
    run, config = tmp_path / "run", folder / "run0.toml"
    ended = ends(2, victim, tmp_path, config, run, crime, init=f"tcp://127.0.0.1:{free_port()}")
    assert ended.keys() == {0, 1}
    assert len(faults(run)) == 1                     # and it is not rank 0 that says so, where it is dead
    assert "rank 0" in faults(run)[0]
    assert (run / "unfinished").read_text() == "cut off\n"
    ranks.run(2, runs, config, run)
    assert losses(run) == pair


def stopped(rank: int, n: int, config: Path, run: Path, numbers: list[int]) -> int:
    """Trains. The save of step 3 is slow; while it is under way rank 1 gets the first signal, and both ranks the others
    in the middle of the last save."""
    publish, meet = Store._publish, Stop.meet
    stops: list[Stop] = []

    def slow(self: Store, step: int, *args: Any, **kw: Any) -> Any:
        if rank == 0 and step == EVERY:
            (run / "saving").touch()
            assert stops[0].known.wait(30)
        elif rank == 0:
            for number in numbers[1:]:
                os.kill(os.getpid(), number)
        return publish(self, step, *args, **kw)

    def met(self: Stop, *args: Any) -> None:
        stops.append(self)
        meet(self, *args)

    def strike() -> None:
        while not (run / "saving").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), numbers[0])

    Store._publish = slow
    Stop.meet = met  # pyright: ignore[reportAttributeAccessIssue]
    if rank == 1:
        at_step(EVERY + 1, strike)
    return train(config, run)


@pytest.mark.parametrize("numbers", [[signal.SIGUSR1], [signal.SIGTERM, signal.SIGTERM]], ids=["USR1", "TERM twice"])
def test_signals_in_the_middle_of_a_save_cost_nothing(folder: Path, pair: list[float], tmp_path: Path,  # noqa: F811
                                                      numbers: list[int]):
    run, config = tmp_path / "run", folder / "run0.toml"
    assert ranks.run(2, stopped, config, run, numbers) == [0, 0]
    _, told, end = events.read(run)
    assert told["step"] in (EVERY + 1, EVERY + 2)            # rank 0 may have begun one more
    assert told["signal"] == end["signal"] == f"{signal.Signals(numbers[0]).name} to rank 1"
    assert sorted(p.name for p in run.glob("checkpoints/*")) == [f"step-{s:08d}" for s in (EVERY, told["step"])]
    ranks.run(2, runs, config, run)
    assert losses(run) == pair


def poisoned(rank: int, n: int, config: Path, run: Path, cut: bool) -> int:
    """Trains; the gradient of step 5 is NaN, and if `cut` the program ends in step 8."""
    update = Optimizer.step

    def step(self: Optimizer, *args: Any, **kw: Any) -> Report:
        if int(self.steps) + int(self.skipped) == 4:
            next(iter(self.params.values())).grad.fill_(float("nan"))  # pyright: ignore[reportOptionalMemberAccess]
        return update(self, *args, **kw)

    Optimizer.step = step
    if cut:
        at_step(7, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    return train(config, run)


def test_a_nan_is_skipped_and_counted_also_over_a_restart(folder: Path, tmp_path: Path):  # noqa: F811
    config = folder / "run0.toml"
    assert ranks.run(1, poisoned, config, tmp_path / "whole", False) == [0]
    assert ranks.run(1, poisoned, config, tmp_path / "cut", True) == [130]
    assert ranks.run(1, runs, config, tmp_path / "cut") == [0]
    assert [r["skipped"] for r in records(tmp_path / "cut").values()] == [0] * 4 + [1] * (STEPS - 4)
    assert [e["step"] for e in events.read(tmp_path / "cut") if e["event"] == "skip"] == [5]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_torn_newest_checkpoint_costs_the_steps_since_the_one_before(folder: Path, alone: list[float],  # noqa: F811
                                                                       tmp_path: Path):
    run, config = tmp_path / "run", folder / "run0.toml"
    ranks.run(1, runs, config, run, "--steps-now", "7")
    torn = run / "checkpoints" / "step-00000007" / "rank-00000.bin"
    os.truncate(torn, torn.stat().st_size // 2)
    ranks.run(1, runs, config, run)
    assert [e["step"] for e in events.read(run)] == [0, 7, 6, STEPS]
    assert losses(run) == alone


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path / "disk"], check=True)
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)


def crowded(rank: int, n: int, config: Path, disk: Path) -> int:
    """Trains on a disk that others fill to its last page in step 5, between the first and the second checkpoint."""
    def fill() -> None:
        with open(disk / "others", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    if rank == 0:
        at_step(EVERY + 2, fill)
    return train(config, disk / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_costs_checkpoints_and_records_and_after_room_is_made_nothing(folder: Path, pair: list[float],  # noqa: F811
                                                                                  disk: Path):
    run, config = disk / "run", folder / "run0.toml"
    assert ranks.run(2, crowded, config, disk) == [1, 1]
    unsaved = [e["error"] for e in events.read(run) if e["event"] == "unsaved"]
    for step, why in zip(range(2 * EVERY, STEPS + 1, EVERY), unsaved, strict=True):
        assert why.startswith(f"step {step} was not saved in {run / 'checkpoints'} (rank ")
        assert why.endswith("No space left on device); the checkpoints before it are untouched")
    assert [p.name for p in run.glob("checkpoints/*")] == [f"step-{EVERY:08d}"]
    assert (run / "unfinished").read_text() == f"step {STEPS} was not saved\n"
    assert "No space left on device" in status.said(run, time.time())["last error"]
    (disk / "others").unlink()
    assert ranks.run(2, runs, config, run) == [0, 0]
    assert losses(run) == pair


def test_a_corrupt_shard_ends_the_run_until_it_is_mended(folder: Path, alone: list[float], tmp_path: Path):  # noqa: F811
    """Another start would fail again, so the marker goes."""
    run, config, shards = tmp_path / "run", tmp_path / "run.toml", tmp_path / "shards"
    shutil.copytree(folder / "shards", shards)
    config.write_text((folder / "run0.toml").read_text().replace(str(folder / "shards"), str(shards)))
    blocks = Corpus(shards).manifest.shards[1].blocks
    whole = (shards / "shard-00001.tar").read_bytes()
    harmed = bytearray(whole)
    for block in blocks:
        harmed[int(block[Columns.OFFSET]) + 600] ^= 1
    (shards / "shard-00001.tar").write_bytes(harmed)
    assert ranks.run(1, runs, config, run) == [2]
    assert "shard-00001.tar: truncated or corrupt at byte " in faults(run)[0]
    assert not (run / "unfinished").exists()
    (shards / "shard-00001.tar").write_bytes(whole)
    assert ranks.run(1, runs, config, run) == [0]
    assert losses(run) == alone


def test_a_shard_that_another_rank_than_0_leaves_out_is_told_and_counted(folder: Path, tmp_path: Path):  # noqa: F811
    run, config, shards = tmp_path / "run", tmp_path / "run.toml", tmp_path / "shards"
    shutil.copytree(folder / "shards", shards)
    config.write_text((folder / "run0.toml").read_text().replace(str(folder / "shards"), str(shards)))
    harmed, first = bytearray((shards / "shard-00000.tar").read_bytes()), 13            # of the lanes of rank 1
    harmed[int(Corpus(shards).manifest.shards[0].blocks[first][Columns.OFFSET]) + 600] ^= 1
    (shards / "shard-00000.tar").write_bytes(harmed)
    assert ranks.run(2, runs, config, run, "data.on_error=skip", "--steps-now", "2") == [0, 0]
    skipped = [(e["rank"], e["step"]) for e in events.read(run) if e["event"] == "skip"]
    assert skipped == [(1, 1)]
    assert records(run)[2]["skipped_shards"] == 1         # of the first step rank 0 may not have heard yet


def test_a_server_of_shards_that_stalls_ends_the_run_within_its_limit_and_may_be_tried_again(
        folder: Path, alone: list[float], tmp_path: Path):  # noqa: F811
    run, server = tmp_path / "run", Server(folder / "shards")
    limits = ["data.retries=0", "data.stall_seconds=0.3", "data.fetch_minutes=0.1"]
    try:
        server.faults = {f"shard-{i:05d}.tar": ["silent"] for i in range(1, 9)}
        source = f"data.sources.small.shards={server.url}"
        assert ranks.run(1, runs, folder / "run0.toml", run, source, *limits, timeout=30) == [2]
        assert "no byte came for 0.3 s" in faults(run)[0]
        assert (run / "unfinished").exists()
        server.faults = {}
        assert ranks.run(1, runs, folder / "run0.toml", run, source, *limits) == [0]
    finally:
        server.released.set()
        server.httpd.shutdown()
    assert losses(run) == alone


def without_worker(rank: int, n: int, config: Path, run: Path) -> int:
    """Trains; in step 5 the reader of the data is killed. Its pipe is made short, that it has not read all by then."""
    made = _Crew.__init__

    def short(self: _Crew, *args: Any) -> None:
        made(self, *args)
        for _, pipe in self.workers:
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, 4096)

    def strike() -> None:
        for worker in multiprocessing.active_children():
            if worker.pid is not None and worker.name.startswith("data worker"):
                os.kill(worker.pid, signal.SIGKILL)

    _Crew.__init__ = short  # pyright: ignore[reportAttributeAccessIssue]
    at_step(5, strike)
    return train(config, run)


def test_a_killed_worker_of_the_loader_ends_the_run_and_another_start_mends_it(folder: Path,  # noqa: F811
                                                                               alone: list[float], tmp_path: Path):
    run, config = tmp_path / "run", folder / "run1.toml"
    assert ranks.run(1, without_worker, config, run) == [2]
    assert "was killed by signal 9; no data is lost: resume" in faults(run)[0]
    assert (run / "unfinished").exists()
    assert ranks.run(1, runs, config, run) == [0]
    assert losses(run) == alone


TORCHRUN = """-m torch.distributed.run --nnodes 1:2 --nproc-per-node 1 --max-restarts 1 --monitor-interval 0.1
--rdzv-id x --rdzv-backend c10d --rdzv-conf last_call_timeout=1,keep_alive_interval=1,is_host={}
--rdzv-endpoint 127.0.0.1:{} -m stepladder.launch.cli train {} --folder {}"""


def lives(pid: str) -> bool:
    """Whether a process has not ended; one whose parent is gone may never be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def elastic(config: Path, run: Path) -> int:
    """The exit code of one of two agents, which stand for two machines. The other is killed, and its rank, which it
    leaves behind, has to follow it; this one holds the rendezvous, and goes on."""
    port = free_port()
    left, lost = (subprocess.Popen([sys.executable, *TORCHRUN.format(host, port, config, run).split()],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for host in ("true", "false"))
    try:
        end = time.monotonic() + 200
        while not any(run.glob("checkpoints/step-????????")):
            assert time.monotonic() < end
            time.sleep(0.05)
        workers = Path(f"/proc/{lost.pid}/task/{lost.pid}/children").read_text().split()
        lost.kill()
        lost.wait()
        while any(map(lives, workers)):
            assert time.monotonic() < end
            time.sleep(0.05)
        return left.wait(200)
    finally:
        for agent in (left, lost):
            agent.kill()
            agent.wait()


@pytest.fixture(scope="module", autouse=True)
def beside(request: pytest.FixtureRequest, folder: Path) -> Iterator[Future[int]]:  # noqa: F811
    """What is to come of the run that loses a machine: it mostly waits, and does so while others are tested."""
    config = folder / "elastic.toml"
    text = (folder / "run0.toml").read_text().replace("fp32", "fp64")          # where little is lost to rounding
    config.write_text(text.replace(f"steps = {STEPS}", "steps = 40"))
    asked = any("machines_that_are_left" in item.name for item in request.session.items)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(elastic, config, folder / "elastic") if asked else Future()


def test_torchrun_goes_on_with_the_machines_that_are_left_and_the_same_batch(folder: Path,  # noqa: F811
                                                                             beside: Future[int]):
    ranks.run(1, runs, folder / "elastic.toml", folder / "smaller")
    assert beside.result() == 0
    assert [e["ranks"] for e in events.read(folder / "elastic") if "ranks" in e] == [2, 1]
    ours, theirs = records(folder / "elastic"), records(folder / "smaller")
    assert list(ours) == list(theirs)
    assert [r["loss"] for r in ours.values()] == pytest.approx([r["loss"] for r in theirs.values()], rel=1e-6)
