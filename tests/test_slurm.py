"""Jobs on a real Slurm cluster: slurm/train.sbatch starts, stops and restarts runs as it says."""
from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import cluster
import jobs
import pytest
import ranks
from test_resume import lambda_train, records, train

from stepladder.launch import events, slurm
from stepladder.parallel.watch import EXIT

needs_slurm = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where whole runs are, and their shards and run.toml."""
    folder = tmp_path_factory.mktemp("whole")
    jobs.run_file(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def beside(request: pytest.FixtureRequest, whole: Path) -> Iterator[dict[str, tuple[Future, Path]]]:
    """The jobs of whole runs that tests ask for: they go on while the short ones are tested."""
    asked = {item.callspec.params.get("ended") for item in request.session.items if hasattr(item, "callspec")}
    every = jobs.prepared(whole) if asked - {None} and not cluster.missing() else {}
    with ThreadPoolExecutor(3) as pool:
        yield {name: (pool.submit(job, folder), folder) for name, (job, folder) in every.items() if name in asked}


@pytest.fixture
def ended(request: pytest.FixtureRequest, beside: dict[str, tuple[Future, Path]]) -> tuple[Path, Any]:
    """The folder of such a job, and what Slurm says of it in the end."""
    job, folder = beside[request.param]
    return folder, job.result()


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> Path:
    """The same run on two gloo ranks of this machine."""
    ranks.run(2, lambda_train, whole / "run.toml", whole / "run")
    return whole / "run"


def losses(run: Path, steps: int = jobs.STEPS) -> list[float]:
    found = records(run)
    assert list(found) == list(range(1, steps + 1))
    return [r["loss"] for r in found.values()]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    assert not cluster.missing()
    with cluster.Cluster(tmp_path_factory.mktemp("slurm"), 3, silence=5) as up:
        yield up


@pytest.fixture
def job(nodes: cluster.Cluster, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits train.sbatch with `program`, Bash, in place of stepladder: one task on each of two nodes."""
    submitted = []

    def submit(program: str, *options: str, **settings: str) -> str:
        stepladder = tmp_path / "bin" / "stepladder"
        stepladder.parent.mkdir()
        stepladder.write_text(f"#!/bin/bash\ncd {tmp_path}/run; n=${{SLURM_RESTART_COUNT:-0}}\n{program}\n")
        stepladder.chmod(0o755)
        (tmp_path / "run.toml").touch()
        script = tmp_path / "train.sbatch"
        script.write_text(slurm.filled(slurm.TEMPLATE.read_text(), {
            "nodes": "2", "gpus-per-node": "", "job-name": "two words", "chdir": str(tmp_path)}, {
            "PER_NODE": "1", "START": "srun", "FOLDER": f"{tmp_path}/run", "BIN": str(stepladder.parent),
            "CHECK": [], **settings}))
        nodes.idle()                           # of the job before: one of 1-3 nodes would begin with fewer
        submitted.append(nodes.submit(script, f"--output={tmp_path}/log", *options))
        return submitted[-1]
    yield submit
    for number in submitted:                   # of a test that failed: the next waits for idle nodes
        nodes.call("scancel", "--full", number, check=False)


UNFINISHED = "echo cut off >unfinished"
SAVED = "mkdir -p checkpoints/step-0000000$n"


@needs_slurm
@pytest.mark.parametrize(("program", "restarts", "says"), [
    ("exit 3", 0, "over, with code "),
    (f"{UNFINISHED}; exit 70", 1, "not started again: no checkpoint since restart 1"),
    (f"{UNFINISHED}; {SAVED}", 1, "not started again: it was restarted 1 times, and RESTARTS = 1"),
    (f"{UNFINISHED}; touch $STEPLADDER_REFUSED; exit 2", 0, "not started again: it would be refused again; "),
], ids=["finished", "no progress", "cap", "refused"])
def test_the_marker_decides_on_a_restart_and_the_exit_code_does_not(nodes, job, tmp_path, program, restarts, says):
    number = job(program, RESTARTS="1" if "RESTARTS" in says else "9")
    nodes.wait(number, "FAILED" if "exit" in program else "COMPLETED", 30)
    assert nodes.job(number)["Restarts"] == str(restarts)
    log = (tmp_path / "log").read_text()
    assert says in log.splitlines()[-1]
    assert log.count("requeued") == restarts
    assert log.count("restart ") - log.count("since restart ") == restarts + 1         # one log of all starts


# In Python, as stepladder is: a shell cannot listen to what it was started deaf to.
LISTENS = f"""{UNFINISHED}; {SAVED}; exec {sys.executable} -S -c '
import os, signal, sys, time
name = f"{{sys.argv[1]}}-{{sys.argv[2]}}"
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, _: print(signal.Signals(n).name, file=open(f"got-{{name}}", "a"), flush=True))
open(f"ready-{{name}}", "w")
for _ in range(100):
    time.sleep(0.1)
    if os.path.exists(f"got-{{name}}"):
        break
time.sleep(0.5)
if name == "1-0":
    os.remove("unfinished")
' $n $SLURM_PROCID"""


@needs_slurm
def test_near_its_limit_a_job_tells_every_task_once_and_goes_on(nodes, job, tmp_path):
    number = job(LISTENS)
    for restart in range(2):
        nodes._wait("the tasks", lambda: len([*tmp_path.glob(f"run/ready-{restart}-*")]) == 2, 20)  # noqa: B023
        nodes.call("scancel", "--batch", "--signal=USR1", number)      # what --signal=B:USR1@300 does
        if restart == 0:
            nodes.wait(number, "RUNNING", 20, restarts=1)
    assert nodes.wait(number, "COMPLETED", 20)["Restarts"] == "1"
    assert {f.name: f.read_text().split() for f in tmp_path.glob("run/got-*")} == {
        f"got-{n}-{rank}": ["SIGUSR1"] for n in range(2) for rank in range(2)}


@needs_slurm
def test_a_cancelled_job_saves_and_stays_cancelled(nodes, job, tmp_path):
    number = job(LISTENS)
    nodes._wait("the tasks", lambda: len([*tmp_path.glob("run/ready-0-*")]) == 2, 20)
    nodes.call("scancel", number)
    assert nodes.wait(number, "CANCELLED", 20)["Restarts"] == "0"
    nodes._wait("its last word", lambda: "cancelled, or preempted" in (tmp_path / "log").read_text(), 10)
    assert sorted(f.name for f in tmp_path.glob("run/got-*")) == ["got-0-0", "got-0-1"]


@needs_slurm
@pytest.mark.parametrize("grace", [0, 5])
def test_a_preempted_job_starts_again_with_and_without_grace(nodes, job, tmp_path, grace):
    """With grace only the tasks are told: a job that then ends well would be over for Slurm."""
    nodes.call("scontrol", "update", "partitionname=low", f"GraceTime={grace}")
    number = job(LISTENS)
    nodes._wait("the tasks", lambda: len([*tmp_path.glob("run/ready-0-*")]) == 2, 20)
    nodes.call("srun", "--partition=high", "--nodes=3", "--exclusive", "true")
    nodes.wait(number, "RUNNING", 20, restarts=1)
    nodes._wait("the tasks", lambda: len([*tmp_path.glob("run/ready-1-*")]) == 2, 20)
    nodes.call("scancel", "--signal=USR1", number)
    assert nodes.wait(number, "COMPLETED", 20)["Restarts"] == "1"
    assert (tmp_path / "run" / "got-0-1").read_text().split()[0] == "SIGTERM"


@needs_slurm
def test_the_run_folder_says_what_ran_and_no_secrets(nodes, job, tmp_path, monkeypatch):
    secret = os.urandom(8).hex()
    for name in ("SLURM_JOB_TOKEN", "NCCL_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    nodes.wait(number := job("echo said $SLURM_PROCID; touch made", CODE=str(slurm.ROOT)), "COMPLETED", 20)
    logs = tmp_path / "run" / "slurm" / f"{number}-0"
    assert [(logs / f"rank-{r}.log").read_text() for r in range(2)] == ["said 0\n", "said 1\n"]
    environment = (logs / "environment.txt").read_text()
    assert "NCCL_SOCKET_IFNAME=eth0" in environment
    assert f"SLURM_JOB_ID={number}" in environment
    assert not [f for f in logs.iterdir() if secret in f.read_text()]
    head = subprocess.run(["git", "-C", slurm.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert (logs / "commit.txt").read_text() == head
    made = [f for f in (tmp_path / "run", *(tmp_path / "run").rglob("*")) if f.stat().st_mode & 0o002]
    assert not made                         # by anybody, though the user's umask lets them


UNFIT = """if [ "$1" = check ]; then
  [[ " $* " == *" n2 "* ]] || exit 0
  [ $SLURM_PROCID = 0 ] || exit 127     # as if it were not installed there: the other must not be ended for it
  sleep 0.5
  while [ "$1" != --bad ]; do shift; done
  echo -n "WHO" >"$2"; exit 1
fi
[ "$1" = train ] && echo "trained on $SLURM_JOB_NODELIST" >trained"""


@needs_slurm
@pytest.mark.parametrize(("who", "says"), [
    ("n2 its disk is full\n", "requeued without n2: delete in "),
    ("", "not started: no node is fitter than the others; ")])
def test_a_job_starts_again_without_the_nodes_that_are_unfit(nodes, job, tmp_path, who, says):
    number = job(UNFIT.replace("WHO", who), CHECK=["--gib", "0"])
    nodes.wait(number, "COMPLETED" if who else "FAILED", 30)
    assert says in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "trained").exists() is bool(who)
    if who:
        assert (tmp_path / "run" / "trained").read_text() == "trained on n[1,3]\n"
        excluded = (tmp_path / "run" / "slurm" / "excluded").read_text()
        assert re.fullmatch(rf"n2 its disk is full \(job {number}, [-:T\d]+\)\n", excluded)


BLAMES = """[ "$1" = check ] || exit 3
[ $n != 0 ] || exit 1                   # without a word
touch checking-$n-$SLURM_PROCID
[ $SLURM_PROCID = 0 ] || exec sleep 60
while [ "$1" != --bad ]; do shift; done
trap 'echo n2 is silent >"$2"; exit 1' TERM
sleep 60 & wait"""


@needs_slurm
def test_a_check_that_says_nothing_or_is_cut_off_finds_no_node_unfit(nodes, job, tmp_path):
    """With grace only the tasks are told, by scancel the job too. A check makes no checkpoint."""
    nodes.call("scontrol", "update", "partitionname=low", "GraceTime=20")
    number = job(BLAMES, CHECK=["--gib", "0"])
    for restart in (1, 2):
        nodes.wait(number, "RUNNING", 20, restarts=restart)
        nodes._wait("the check", lambda: len([*tmp_path.glob(f"run/checking-{restart}-*")]) == 2, 20)  # noqa: B023
        if restart == 1:
            nodes.call("srun", "--partition=high", "--nodes=3", "--exclusive", "true")
    nodes.call("scancel", number)
    nodes.wait(number, "CANCELLED", 20)
    nodes._wait("its last word", lambda: "cancelled, or preempted" in (tmp_path / "log").read_text(), 10)
    said = re.findall(r"the check named no node; .*, code (\d+): requeued", (tmp_path / "log").read_text())
    assert said == ["1", "143"]
    assert not (tmp_path / "run" / "slurm" / "excluded").exists()


@needs_slurm
@pytest.mark.parametrize(("settings", "says"), [
    ({"RUN": "no.toml"}, r"not started: n\d has no no.toml; mend RUN or BIN in this script"),
    ({"BIN": "/no"}, r"not started: n\d has no /no/stepladder; mend RUN or BIN in this script"),
    ({"CHECK": ["--gibb", "9"]}, r"check: error: --gibb\n.* not started: no check was made; mend CHECK")],
    ids=["no run", "no stepladder", "no check"])
def test_a_job_that_was_asked_for_wrongly_says_so_and_blames_no_node(nodes, job, tmp_path, settings, says):
    number = job('[ "$1" != check ] || { echo "stepladder check: error: $2"; exit 2; }', **settings)
    assert nodes.wait(number, "FAILED", 20)["Restarts"] == "0"
    assert re.search(rf"{says}\n$", (tmp_path / "log").read_text())
    assert not (tmp_path / "run" / "slurm" / "excluded").exists()


# Written by one task, and whole when it appears.
WAITS = f"""[ $SLURM_PROCID != 0 ] || {{ echo "$SLURM_STEP_NODELIST" >written; mv written nodes-$n; }}
[ $n = 0 ] || {{ rm -f unfinished; exit; }}
{UNFINISHED}; {SAVED}
until [ -e lost ]; do sleep 0.1; done"""


@needs_slurm
@pytest.mark.parametrize(("fit", "then"), [([], "n[1-2]"), (["1", "3"], "n1")])
def test_a_job_that_lost_a_node_goes_on_with_as_many_as_are_left_and_fit(nodes, job, tmp_path, fit, then):
    number = job(WAITS, "--nodes=1-3", FIT=fit)
    nodes._wait("the tasks", (tmp_path / "run" / "nodes-0").exists, 20)
    assert (tmp_path / "run" / "nodes-0").read_text() == "n[1-3]\n"
    nodes.off("n3")
    # What Slurm finds out by itself; drained besides, for an answer still under way would bring the node back.
    for state in ("down", "drain"):
        nodes.call("scontrol", "update", "nodename=n3", f"state={state}", "reason=off")
    (tmp_path / "run" / "lost").touch()
    try:
        nodes.wait(number, "COMPLETED", 40, restarts=1)
    finally:
        nodes.on("n3")
        nodes.call("scontrol", "update", "nodename=n3", "state=resume")
        nodes.idle()
    assert (tmp_path / "run" / "nodes-1").read_text() == f"{then}\n"
    assert ("training on 1 of 2 nodes" in (tmp_path / "log").read_text()) is bool(fit)


def train_at(rank: int, network: str, config: Path, run: Path) -> None:
    """`stepladder train` as rank 0 or 1 of two, within the network of a node."""
    with open(f"/run/netns/{network}") as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="10.77.0.1", MASTER_PORT="29500",
                      GLOO_SOCKET_IFNAME="eth0")
    os._exit(train(config, run, "train.collective_minutes=0.1"))


def apart(nodes: cluster.Cluster, config: Path, run: Path, cut: bool) -> list[int | None]:
    """Exit codes of two ranks at two nodes; `cut` takes one node's cable out after a checkpoint."""
    processes = [ranks.process(train_at, rank, f"{nodes.tag}-n{rank + 1}", config, run) for rank in range(2)]
    for p in processes:
        p.start()
    try:
        if cut:
            nodes._wait("a checkpoint", lambda: any(run.glob("checkpoints/step-????????")), 90)
            nodes._ip("-n ctl link set v2 down")
        for p in processes:
            p.join(90)
        return [p.exitcode for p in processes]
    finally:
        nodes._ip("-n ctl link set v2 up")
        for p in processes:
            p.kill()
            p.join()


@needs_slurm
def test_ranks_whose_network_is_cut_end_and_go_on_when_it_is_back(nodes, whole, undisturbed, tmp_path):
    config, run = whole / "run.toml", tmp_path / "run"
    assert apart(nodes, config, run, cut=True) == [EXIT, EXIT]
    (fault,) = [e for e in events.read(run) if e["event"] == "fault"]
    assert re.search(r"rank 1 \(.*\) has been silent for \d+ s|the store, at rank 0", fault["error"])
    assert (run / "unfinished").exists()
    assert apart(nodes, config, run, cut=False) == [0, 0]
    assert losses(run) == losses(undisturbed)


# What came of the jobs beside

@needs_slurm
@pytest.mark.parametrize(("ended", "launcher", "told"), [
    ("told to stop", "torchrun", ["start", "signal", "end", "resume", "end"]),
    ("node lost", "Slurm", ["start", "fault", "resume", "end"]),
    ("out of time", "Slurm", ["start", "signal", "end", "resume", "end"])], indirect=["ended"])
def test_a_disturbed_job_has_the_losses_of_an_undisturbed_run(ended, undisturbed, launcher, told):
    folder, job = ended
    happened = events.read(folder / "run")
    assert job["Restarts"] == "1"
    assert [e["event"] for e in happened] == told
    assert {e["launcher"] for e in happened if "launcher" in e} == {launcher}
    assert losses(folder / "run") == losses(undisturbed)
    assert [r["step"] for r in records(folder / "run").values() if r.get("resumed")]


@needs_slurm
@pytest.mark.parametrize("ended", ["told to stop"], indirect=True)
def test_nothing_between_slurm_and_the_ranks_dies_of_a_signal_while_they_save(ended):
    folder, _ = ended
    assert ", code 0: requeued" in (folder / "log").read_text()
    assert [log.read_text() for log in folder.glob("run/slurm/*/check.log")] == ["2 machines fit: n1 n2\n"] * 2


@needs_slurm
@pytest.mark.parametrize("ended", ["node lost"], indirect=True)
def test_the_rank_of_a_lost_node_is_named(ended):
    folder, _ = ended
    assert re.search(r"rank 1 \(.*\) has been silent for \d+ s", events.read(folder / "run")[1]["error"])


@needs_slurm
@pytest.mark.parametrize("ended", ["out of time"], indirect=True)
def test_a_time_limit_is_announced_by_the_clock_and_never_met(ended):
    """By Slurm's, which looks every half minute, and no more than a minute before the limit."""
    folder, job = ended
    _, signal, end, *_ = events.read(folder / "run")
    log = (folder / "log").read_text()
    began = datetime.fromisoformat(log.split()[0]).timestamp()
    assert job["TimeLimit"] == "00:02:00"
    assert 50 < signal["time"] - began < end["time"] - began < 120
    assert f"stopped by {end['signal']} at step {end['step']}, code 0: requeued" in log
    assert "DUE TO TIME LIMIT" not in log


@needs_slurm
@pytest.mark.parametrize("ended", ["launchers"], indirect=True)
def test_two_and_four_nodes_have_the_same_losses_under_every_launcher(ended, undisturbed):
    """Bit for bit on as many processes; two and four of them add up in another order."""
    folder, found = ended
    names = {"torchrun": "torchrun", "srun": "Slurm", "mpiexec": "MPICH", "deepspeed": "DeepSpeed's launcher"}
    want = {2: losses(undisturbed)[:jobs.FIRST], 4: losses(folder / "srun-4" / "run", jobs.FIRST)}
    assert want[2] == pytest.approx(want[4], rel=1e-5)
    for job, said in found.items():
        launcher, n = job.split("-")
        (start, _) = events.read(folder / job / "run")
        assert (said["NumNodes"], start["launcher"], start["ranks"]) == (n, names[launcher], int(n)), job
        assert losses(folder / job / "run", jobs.FIRST) == want[int(n)], job
        if (seen := folder / job / "seen").exists():
            assert len(set(seen.read_text().split())) == int(n), job              # hosts
