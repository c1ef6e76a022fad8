"""What befalls a run is in events.jsonl, and RUN/unfinished stands exactly while it should be started again."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
from test_resume import EVERY, STEPS, folder, records, train  # noqa: F401  the fixture: shards and run.toml

from stepladder.launch import agree, cli, events, stop, world
from stepladder.launch.stop import Stop
from stepladder.parallel.lock import InUse
from stepladder.parallel.optimizer import Optimizer, Report
from stepladder.parallel.watch import EXIT, LostRank


def at_step(n: int, do: Callable[[], object]) -> None:
    """Let this process do something in the middle of step n."""
    update = Optimizer.step

    def step(self: Optimizer, *args: object, **kw: object) -> Report:
        if int(self.steps) == n - 1:
            do()
        return update(self, *args, **kw)  # pyright: ignore[reportArgumentType]

    Optimizer.step = step  # pyright: ignore[reportAttributeAccessIssue]


def signalled(rank: int, n: int, config: Path, run: Path, to: int, numbers: list[int]) -> int:
    """Trains; in step 2 rank `to` gets the signals while it waits for the other rank in a collective, where Python runs
    no handler, and the other goes on with the step when it knows of them."""
    (run.parent / f"pid-{rank}").write_text(str(os.getpid()))
    meet = Stop.meet

    def strike(of: Stop) -> None:
        time.sleep(0.3)
        for number in numbers:
            os.kill(int((run.parent / f"pid-{to}").read_text()), number)
        assert of.known.wait(30)

    def met(self: Stop, *args: Any) -> None:
        meet(self, *args)
        if rank != to:
            at_step(2, lambda: strike(self))

    Stop.meet = met  # pyright: ignore[reportAttributeAccessIssue]
    return train(config, run)


def resumed(rank: int, n: int, config: Path, run: Path) -> int:
    return train(config, run)


@pytest.mark.parametrize(("to", "numbers", "name"), [
    (0, [signal.SIGTERM, signal.SIGTERM], "SIGTERM"), (1, [signal.SIGUSR1], "SIGUSR1 to rank 1")])
def test_a_signal_to_one_rank_stops_all_after_the_step_under_way_and_the_run_goes_on(folder, tmp_path, to, numbers,  # noqa: F811
                                                                                      name):
    run, config = tmp_path / "run", folder / "run0.toml"
    assert ranks.run(2, signalled, config, run, to, numbers) == [0, 0]
    assert (run / "unfinished").read_text() == f"stopped by {name} at step 2\n"
    assert ranks.run(2, resumed, config, run) == [0, 0]
    assert not (run / "unfinished").exists()
    assert list(records(run)) == list(range(1, STEPS + 1))
    told = [(e["event"], e["step"], e.get("signal")) for e in events.read(run)]
    assert told == [("start", 0, None), ("signal", 2, name), ("end", 2, name), ("resume", 2, None),
                    ("end", STEPS, None)]
    assert [e["ranks"] for e in events.read(run) if "ranks" in e] == [2, 2]


def signalled_early(config: Path, run: Path) -> None:
    """Trains; the signal comes while the program is imported, which takes seconds where torch is not there yet."""
    imported = cli.import_module

    def slow(name: str) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return imported(name)

    cli.import_module = slow  # pyright: ignore[reportAttributeAccessIssue]
    raise SystemExit(train(config, run))


def test_a_signal_while_torch_is_imported_stops_the_run_after_its_first_step(folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    process = ranks.process(signalled_early, folder / "run0.toml", run)
    process.start()                                       # without a group: its threads would take the signal
    process.join(60)
    assert process.exitcode == 0
    assert (run / "unfinished").read_text() == "stopped by SIGTERM at step 1\n"
    assert list(records(run)) == [1]


def signalled_alone(config: Path, run: Path) -> None:
    """Trains as rank 0 of two; the other never comes, and then the signal does."""
    def meet(self: world.World, minutes: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    stop.COMING, world.World.meet = 0.2, meet  # pyright: ignore[reportAttributeAccessIssue]
    train(config, run)


def test_a_start_that_a_signal_ends_before_all_have_come_says_so(folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    process = ranks.process(signalled_alone, folder / "run0.toml", run)
    process.start()
    process.join(20)
    assert process.exitcode == EXIT
    assert not (run / ".untold").exists()                 # or the next start would call this one killed
    assert [e["error"] for e in events.read(run)] == [
        "SIGTERM asks the run to stop, and not all of its ranks have come"]


def killed(rank: int, n: int, config: Path, run: Path) -> bool:
    os.environ.update(NCCL_SOCKET_IFNAME="eth0", HF_TOKEN="hunter2")
    at_step(EVERY, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    return train(config, run) == 130 and (run / "unfinished").read_text() == "cut off\n"


def failed(rank: int, n: int, config: Path, run: Path) -> bool:
    return train(config, run, "optimizer.lr=1e30", "train.clip=0", "train.max_skipped=2") == 2


def test_what_would_fail_again_takes_the_marker_away_and_what_cut_the_run_off_leaves_it(folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    assert ranks.run(1, killed, folder / "run0.toml", run) == [True]
    assert (run / "unfinished").exists()
    assert ranks.run(1, failed, folder / "run0.toml", run) == [True]
    assert not (run / "unfinished").exists()
    told = events.read(run)
    assert [e["event"] for e in told] == ["start", "fault", "start", "skip", "skip", "fault"]
    assert told[0]["environment"]["NCCL_SOCKET_IFNAME"] == "eth0"
    assert "hunter2" not in (run / "events.jsonl").read_text()
    assert told[-1]["error"].startswith("2 steps in a row, 2 to 3, had a gradient that is not finite")


@pytest.mark.parametrize(("error", "stands"), [
    (LostRank("rank 0 lost the others"), True), (RuntimeError("CUDA error: uncorrectable ECC error"), True),
    (agree.Missing("rank 3 did not come"), True), (agree.Disagreement("the ranks differ in data.seq"), False),
    (ValueError("data.seq = 3 is odd; make it even"), False), (KeyboardInterrupt(), True)])
@pytest.mark.parametrize("come", [True, False])
def test_the_marker_outlives_what_a_new_start_may_mend(tmp_path: Path, error: BaseException, stands: bool, come: bool):
    told = events.Events(tmp_path, 0)
    told.begin()
    if come:                                              # all ranks
        told.started()
    with pytest.raises(type(error)), told.faults():
        raise error
    assert (tmp_path / "unfinished").exists() is stands


def test_other_ranks_write_nothing_before_all_have_met_and_then_faults_alone(tmp_path: Path):
    other, main = events.Events(tmp_path, 1), events.Events(tmp_path, 0)
    (tmp_path / ".untold").touch()                        # of a start that was killed
    other.fault("no such file")
    other.begin()
    assert not (tmp_path / "events.jsonl").exists()
    main.begin()
    for told in (other, main):
        told.started()
    other.add("start")
    other.end(3, True, "")
    other.over()
    assert [e["error"][:41] for e in events.read(tmp_path)] == ["the start before this one ended without a"]
    assert (tmp_path / "unfinished").exists()


@pytest.mark.parametrize(("first", "again"), [(0, True), (1, True), (1, False)])
def test_the_first_rank_that_says_why_a_run_ended_is_heard(tmp_path: Path, first: int, again: bool):
    told = [events.Events(tmp_path, rank) for rank in range(2)]
    for each in told:
        each.begin()
        each.started()
    told[0].begins("start")                               # the other has not come so far
    told[first].fault("shard 7 is torn", again)
    told[1 - first].fault("lost another rank")
    assert [(e["event"], e.get("rank"), e.get("error")) for e in events.read(tmp_path)] == [
        ("start", None, None), ("fault", first, "shard 7 is torn")]
    assert (tmp_path / "unfinished").exists() is again
    events.Events(tmp_path, 0).begin()
    assert len(events.read(tmp_path)) == 2                # it did not end without a word


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("marker", ["", "stopped by SIGTERM at step 3\n"])
def test_a_start_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path, rank: int, marker: str):
    if marker:
        (tmp_path / "unfinished").write_text(marker)
    told = [events.Events(tmp_path, rank) for rank in range(2)]
    for each in told:
        each.begin()
        each.started()
    assert (tmp_path / "unfinished").read_text() == (marker or events.STARTING)
    told[rank].fault("model.width: 16 and 32", again=False)
    told[1 - rank].fault("lost another rank")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"unfinished": marker} if marker else {})


@pytest.mark.parametrize("again", [True, False])
def test_what_another_rank_says_before_rank_0_has_come_so_far_holds(tmp_path: Path, again: bool):
    main, other = (events.Events(tmp_path, rank) for rank in range(2))
    main.begin()
    other.started()
    other.fault("GPU 3 is busy", again)
    main.started()
    main.begins("start")
    main.fault("lost another rank")
    assert [e["error"] for e in events.read(tmp_path)] == ["GPU 3 is busy"] * again
    assert [path.name for path in tmp_path.glob("unfinished")] == ["unfinished"] * again


def test_the_script_of_a_job_learns_of_a_start_that_would_be_refused_again(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("STEPLADDER_REFUSED", str(told := tmp_path / "refused"))
    for error in (LostRank("rank 0 lost the others"), InUse("another program writes there")):   # or did
        with pytest.raises(type(error)), events.refusals(str(told)):
            raise error
        assert not told.exists()
    (tmp_path / "run.toml").write_text("[model]\nwitdh = 64\n")
    assert train(tmp_path / "run.toml", tmp_path / "run") == 2
    assert told.exists()
    assert not (tmp_path / "run").exists()
    told.unlink()
    for flags, code in (["--help"], 0), (["run.toml", "--fodler", "run"], 2), (["run.toml", "--steps-now=0"], 2):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", *flags])
        assert (ended.value.code, told.exists()) == (code, code != 0)
        told.unlink(missing_ok=True)


def test_a_full_disk_costs_no_more_than_the_line(tmp_path: Path):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    (tmp_path / "unfinished").symlink_to("/dev/full")
    told = events.Events(tmp_path, 0)
    told.add("start")
    told.goes_on("cut off")


def test_a_line_that_was_cut_off_is_left_out_and_alone(tmp_path: Path):
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "en')
    assert events.read(tmp_path) == [{"event": "start"}]
    told = events.Events(tmp_path, 0)
    told.add("resume")
    told.add("end")
    assert [e["event"] for e in events.read(tmp_path)] == ["start", "resume", "end"]
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 4
