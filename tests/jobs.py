"""Whole runs as jobs of a Slurm cluster, for test_slurm.py: each function is a job from its start to its end, on a
cluster of its own, so that they can go on beside one another and beside other tests. They mostly wait."""
from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import cluster
import corpora
from test_resume import RUN

from stepladder.launch import cli, slurm

STEPS = 24
FIRST = 3                                   # steps of the jobs that only compare launchers
BIN = str(Path(sys.executable).parent)


def run_file(folder: Path) -> None:
    """Shards, and the TOML file of the run that all these jobs train."""
    shards = corpora.corpus(folder / "shards", corpora.texts(300))
    text = RUN.replace("SHARDS", str(shards)).replace("WORKERS", "0")
    for old, new in (("steps = 12", f"steps = {STEPS}"), ("every = 3", "every = 5"), ("= 512", "= 256"),
                     ("layers = 4", "layers = 2"), ('["gla", "full"]', '["gla"]'), ("rows = 4", "rows = 2")):
        assert old in text
        text = text.replace(old, new)
    (folder / "run.toml").write_text(text)


def script(folder: Path, config: Path, *more: str, check: bool = False, **settings: str | list[str]) -> None:
    """The job that `stepladder slurm` prints for runs of one process a node; check: its nodes are checked before."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["slurm", str(config), "--per-node", "1", "--folder", str(folder / "run"), *more]) == 0
    folder.mkdir(parents=True)
    text = slurm.filled(out.getvalue(), {}, {"CHECK": ["--gib", "0.01"] if check else [], **settings})
    (folder / "train.sbatch").write_text(text)


def submit(nodes: cluster.Cluster, folder: Path, *options: str) -> str:
    return nodes.submit(folder / "train.sbatch", f"--output={folder}/log", *options)


def saved(nodes: cluster.Cluster, folder: Path) -> None:
    nodes._wait("a checkpoint", lambda: any(folder.glob("run/checkpoints/step-????????")), 90)


# What befalls the job of a folder. Each returns what Slurm says of it in the end.

def told_to_stop(folder: Path) -> dict[str, str]:
    """USR1 reaches every process of its step, torchrun's too."""
    with cluster.Cluster(folder / "cluster", 2) as nodes:
        number = submit(nodes, folder)
        saved(nodes, folder)
        nodes.call("scancel", "--signal=USR1", number)
        return nodes.wait(number, "COMPLETED", 90, restarts=1)


def node_lost(folder: Path) -> dict[str, str]:
    with cluster.Cluster(folder / "cluster", 2, silence=5) as nodes:
        number = submit(nodes, folder)
        saved(nodes, folder)
        nodes.off("n2")
        nodes._wait("its requeue", lambda: nodes.job(number)["Restarts"] == "1", 60)       # Slurm's own wait
        nodes.on("n2")
        return nodes.wait(number, "COMPLETED", 90, restarts=1)


SLOW = f"""#!{sys.executable}
import os, sys, time
from stepladder.launch import cli, train
step = train.train_step
def slow(*args):
    time.sleep(0 if "SLURM_RESTART_COUNT" in os.environ else 5)
    return step(*args)
train.train_step = slow
sys.exit(cli.main())
"""


def out_of_time(folder: Path) -> dict[str, str]:
    """The steps of the first start are so slow that it meets its limit. Of Slurm's least, a minute, it is told in the
    first half, when a slow machine still imports torch and is deaf."""
    stepladder = folder / "bin" / "stepladder"
    stepladder.parent.mkdir()
    stepladder.write_text(SLOW)
    stepladder.chmod(0o755)
    with cluster.Cluster(folder / "cluster", 2) as nodes:
        return nodes.wait(submit(nodes, folder, "--signal=B:USR1@3"), "COMPLETED", 240, restarts=1)


# DeepSpeed's launcher goes to its nodes by pdsh, which goes by ssh. There is none here, and srun takes its place.
PDSH = """#!/bin/bash
while [ "$1" != -w ]; do shift; done
hosts=$2; shift 2; commas=${hosts//[^,]/}
exec srun --nodelist="$hosts" --nodes=$((${#commas} + 1)) --ntasks-per-node=1 \\
  bash -c "hostname >>seen; ${*//%n/\\$SLURM_NODEID}"
"""
# A process a node is a task of the srun by which mpiexec goes there, too, and would ask Slurm and not MPI who it is.
OTHERS = {
    "mpiexec": "UCX_TLS=tcp,self mpiexec -n $n -ppn 1 env -u SLURM_STEP_ID bash -c 'hostname >>seen; exec \"$@\"' - "
               "stepladder",
    "deepspeed": "scontrol show hostnames | sed 's/$/ slots=1/' >hosts; deepspeed --hostfile hosts --no_ssh_check "
                 "--master_addr $(hostname) --master_port 12345 --no_local_rank --module stepladder.launch.cli",
}


def other(folder: Path, config: Path, launcher: str) -> None:
    """A job of a launcher that train.sbatch does not know."""
    folder.mkdir()
    (folder / "pdsh").write_text(PDSH)
    (folder / "pdsh").chmod(0o755)
    (folder / "train.sbatch").write_text(f"""#!/bin/bash
#SBATCH --exclusive --mem=0
export PATH={folder}:{BIN}:$PATH OMP_NUM_THREADS=1 n=$SLURM_NNODES
cd {folder}
{OTHERS[launcher]} train {config} --folder {folder}/run --steps-now {FIRST}
""")


def all_launchers(folder: Path) -> dict[str, dict[str, str]]:
    """Jobs of two and of four nodes, as Slurm lets them in; a name ends with its number of nodes."""
    with cluster.Cluster(folder / "cluster", 4) as nodes:
        numbers = {file.parent.name: submit(nodes, file.parent, f"--nodes={file.parent.name[-1]}")
                   for file in sorted(folder.glob("*/train.sbatch"))}
        return {name: nodes.wait(number, "COMPLETED", 150) for name, number in numbers.items()}


def prepared(whole: Path) -> dict[str, tuple[Callable[[Path], object], Path]]:
    """The jobs and their folders; the one that takes longest first."""
    config, two = whole / "run.toml", ("--nodes", "2")
    limit, lost, told, all_ = (whole / name for name in ("limit", "lost", "told", "launchers"))
    script(limit, config, *two, "--start", "srun", "--time", "2", BIN=f"{limit}/bin")
    script(lost, config, *two, "--start", "srun")
    script(told, config, *two, "--start", "torchrun", check=True)
    for start in ("torchrun", "srun"):
        script(all_ / f"{start}-4", config, "--nodes", "4", "--start", start, ARGS=["--steps-now", str(FIRST)])
    for launcher in OTHERS:
        for n in (2, 4):
            other(all_ / f"{launcher}-{n}", config, launcher)
    return {"out of time": (out_of_time, limit), "launchers": (all_launchers, all_), "node lost": (node_lost, lost),
            "told to stop": (told_to_stop, told)}
