"""launch/world.py: every launcher describes the same world, and contradictions are refused in a sentence."""
from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import types
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from stepladder.launch import agree, cli, config, train, world
from stepladder.launch.world import World, first_host, told
from stepladder.parallel.watch import EXIT

RANKS = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
# As srun, torchrun, DeepSpeed's launcher and mpiexec set them: rank 3 of 4, number 1 on the second machine.
TORCHRUN = {**RANKS, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "7",
            "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
TOLD = World(3, 4, 1, "torchrun", 2, 1, "n1:1", held=True, attempt=2)
DEEPSPEED = {**RANKS, "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
BATCH = {"SLURM_JOB_ID": "70", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "2"}
SRUN = {**BATCH, "SLURM_STEP_ID": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_RESTART_COUNT": "1"}
ALONE = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1",
         "SLURM_STEP_TASKS_PER_NODE": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch):
    """mpi4py in a world of so many processes, whose rank 0 waits at n1:1."""
    def size(n: int) -> None:
        comm = types.SimpleNamespace(size=n, bcast=lambda address: address or "n1:1")
        monkeypatch.setattr(world, "import_module", lambda name: types.SimpleNamespace(COMM_WORLD=comm))
    return size


@pytest.mark.parametrize(("env", "want"), [
    ({}, World()),
    (TORCHRUN, TOLD),
    (TORCHRUN | ALONE, TOLD),                                                 # srun started an agent a machine
    (TORCHRUN | BATCH | {"SLURM_NTASKS": "4"}, TOLD),
    (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, replace(TOLD, held=False)),
    (DEEPSPEED, World(3, 4, 1, "DeepSpeed's launcher", 2, 1, "n1:1")),
    (SRUN, World(3, 4, 1, "Slurm", 2, 1, "n1:12506", attempt=1)),
    (SRUN | RANKS, World(3, 4, 3, "RANK and WORLD_SIZE", address="n1:1")),    # a wrapper that exports what Slurm says
    (SRUN | MPICH, World(3, 4, 1, "Slurm", 2, 1, "n1:12506", attempt=1)),   # srun --mpi=pmi2: no need of mpi4py
    (BATCH | {"SLURM_NTASKS": "1"}, World()),
    (OPEN_MPI, World(3, 4, 1, "Open MPI", 2, 0, "n1:1")),
    (MPICH | ALONE, World(3, 4, 1, "MPICH", 2, 0, "n1:1")),                    # mpiexec starts its helpers by srun
])
def test_every_launcher_tells_the_same_world(mpi, env: dict[str, str], want: World):
    mpi(4)
    assert told(env) == want


@pytest.mark.parametrize(("env", "sentence"), [
    ({"RANK": "0"}, "RANK = 0 is set but WORLD_SIZE and MASTER_ADDR and MASTER_PORT not; start with torchrun"),
    (SRUN | RANKS | {"RANK": "0"}, "RANK = 0 and WORLD_SIZE = 4, but Slurm says rank 3 of 4; unset RANK"),
    (SRUN | RANKS | {"WORLD_SIZE": "8"}, "RANK = 3 and WORLD_SIZE = 8, but Slurm says rank 3 of 4; unset RANK"),
    (OPEN_MPI | RANKS | {"RANK": "0"}, "RANK = 0 and WORLD_SIZE = 4, but Open MPI says rank 3 of 4; unset RANK"),
    (BATCH | {"SLURM_NTASKS": "4"}, "this is the batch script of a job of 4 tasks, and would train alone; put srun"),
    (OPEN_MPI, "Open MPI says 4 processes, but mpi4py 1: it was made for another MPI; use the mpiexec of mpi4py's"),
    (SRUN | {"SLURM_STEP_NODELIST": "[1-2"}, "SLURM_STEP_NODELIST = '[1-2' names no host; start with torchrun"),
])
def test_contradictions_are_refused(mpi, env: dict[str, str], sentence: str):
    mpi(1)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        told(env)


def test_of_an_environment_a_run_keeps_what_is_listed_and_no_secrets():
    kept = {"NCCL_IB_HCA": "mlx5", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "8", "LD_LIBRARY_PATH": "/lib"}
    names = "AWS_SECRET_KEY", "HF_TOKEN", "SLURM_JOB_TOKEN", "NCCL_KEY", "TORCH_PASSWORD", "SLURM_JWT", "MY_NCCL_"
    assert world.settings(kept | dict.fromkeys(names, "hunter2")) == kept


def test_mpiexec_without_mpi4py_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(ValueError, match=r"MPICH started this, but package mpi4py does not load .*stepladder\[mpi\]"):
        told(MPICH)


@pytest.mark.parametrize(("nodes", "first"), [
    ("n1", "n1"), ("n[1-2]", "n1"), ("gpu[003-007,12],login", "gpu003"), ("b,a[1-2]", "b"),
    ("r[2,4]n[07-9]-ib,x", "r2n07-ib"),
])
def test_rank_0_is_on_the_first_host_of_the_list(nodes: str, first: str):
    assert first_host(nodes) == first


def test_jobs_steps_and_restarts_of_one_machine_do_not_meet():
    changed = [SRUN, SRUN | {"SLURM_JOB_ID": "71"}, SRUN | {"SLURM_STEP_ID": "6"}, SRUN | {"SLURM_RESTART_COUNT": "2"}]
    assert len({told(env).address for env in changed}) == len(changed)


@pytest.mark.parametrize(("gpus", "local", "index"), [(1, 2, 0), (2, 2, 1)])
def test_a_task_of_slurm_finds_its_gpu_whether_it_sees_all_or_one(monkeypatch, gpus: int, local: int, index: int):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)
    assert World(1, 2, 1, "Slurm", local).device("cuda") == torch.device("cuda", index)


def test_gpus_that_no_task_would_use_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ValueError, match=r"Slurm started 1 task on this machine, which shows 8 GPUs; start one"):
        World(0, 1, 0, "Slurm", 1).device("cuda")
    assert World(0, 1, 0, "Slurm", 1).device("cpu") == torch.device("cpu")


def free_address() -> str:
    with world.listen("127.0.0.1", 0) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_rank_0_says_who_does_not_come_and_the_others_that_it_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agree, "GOODBYE", timedelta(seconds=0.1))
    with pytest.raises(agree.Missing, match=r"^rank 1 did not come within 0\.005 minutes; look at what was said there"):
        World(0, 2, address=free_address()).meet(0.005)
    with pytest.raises(agree.Missing, match=r"^rank 1 did not reach rank 0 at 127\.0\.0\.1:\d+ within 0\.005 minutes "
                                            r"\(Connection refused\); look at what was said there last$") as caught:
        World(1, 2, address=free_address()).meet(0.005)
    assert caught.value.exit == EXIT

    def silent(*_: object) -> None:
        raise TimeoutError("timed out")          # as of a firewall: without a number, and a text of its own

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(agree.Missing, match=r" \(timed out\); "):
        World(1, 2, address="far:1").meet(0.005)


@pytest.mark.parametrize(("host", "interface"), [
    ("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"),
    ("own-name", "0.0.0.0"),             # a machine's name for itself, which leads to itself only: others must get in
])
def test_rank_0_listens_on_the_interface_asked_for(monkeypatch, host: str, interface: str):
    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda h, *a, **k: found({"own-name": "127.0.1.1"}.get(h, "127.0.0.1"),
                                                                        *a, **k))
    with world.listen(host, 0) as listening:
        assert listening.getsockname()[0] == interface


def test_the_store_listens_where_rank_0_does():
    """torch's own listens on all interfaces."""
    address = free_address()
    port = int(address.rpartition(":")[2])
    store = World(0, 2, address=address).meet()
    assert store is not None
    lines = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    assert [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")] \
        == ["0100007F"]


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ValueError, match=r"^rank 0 cannot listen on 192\.0\.2\.1:9 \(Cannot assign"):
        world.listen("192.0.2.1", 9)


def test_torchrun_starts_all_ranks_again_when_one_died_though_only_its_own_agent_counts_that(tmp_path: Path):
    """Two agents, which stand for two machines. Rank 1 dies in the first attempt, when both have met."""
    program = tmp_path / "program.py"
    program.write_text("""
import datetime, os, time
import torch
from stepladder.launch import world
first, w = not os.path.exists("died"), world.find()
store = w.meet(0.5)
store.set(str(w.rank), "here")
store.wait(["0", "1"], datetime.timedelta(seconds=20))
w.connect(torch.device("cpu"), store, datetime.timedelta(seconds=20))
store.set(f"connected {w.rank}", "")
if first and w.rank == 1:
    store.wait(["connected 0"], datetime.timedelta(seconds=20))         # or rank 0 would fail by itself
    open("died", "w")
    os._exit(1)
if first:
    time.sleep(300)
torch.distributed.all_reduce(total := torch.ones(()))
torch.distributed.destroy_process_group()               # as train does: left to the interpreter's exit, gloo aborts
open(f"said-{w.rank}", "w").write(f"{w.launcher} {w.rank}/{w.size} node {w.node} attempt {w.attempt} sum {total:g}")
""")
    host, port = free_address().split(":")
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2:2", "--max-restarts", "1",
         "--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-conf",
         f"is_host={first}", str(program)], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}) for first in (True, False)]
    try:
        said = [agent.communicate(timeout=240)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    told = [(tmp_path / f"said-{r}").read_text() for r in range(2)]
    assert sorted(told) == [f"torchrun {r}/2 node {r} attempt {r} sum 2" for r in range(2)]


DEMO = Path(__file__).parents[1] / "examples/demo.toml"


@pytest.mark.parametrize("axis", ["tp", "ep"])
def test_copy_engines_over_a_slow_link_are_refused(axis):
    run = config.load(DEMO, [f"parallel.{axis}=8", "parallel.copies=true"])
    for local, size in ((0, 16), (8, 16), (8, 8)):          # nobody told, inside the machine, one machine
        world.refuse_far_copies(run, World(0, size, 0, "torchrun", local))
    with pytest.raises(ValueError, match=rf"^parallel.copies = true copies between GPUs of one machine, but parallel."
                                         rf"{axis} = 8 leaves its machine, which has 4 ranks; set it to false$"):
        world.refuse_far_copies(run, World(0, 16, 0, "torchrun", 4))


def test_a_run_says_to_its_mesh_how_many_ranks_its_machine_has(monkeypatch, tmp_path):
    def trainer(run, folder, w, mesh, *rest):
        raise ValueError(f"{mesh.local} ranks; stop")

    monkeypatch.setattr(world, "find", lambda: World(local_size=1))
    monkeypatch.setattr(train, "Trainer", trainer)
    with pytest.raises(ValueError, match=r"^1 ranks"):
        train.run(cli.parse(["train", str(DEMO), "--folder", str(tmp_path / "run")]))


def test_tensor_parallelism_over_a_slow_link_is_warned_of_with_its_cost():
    big = ["model.width=4096", "model.layers=32", "parallel.tp=8", "train.dtype=bf16"]
    run, flops = config.load(DEMO, big), 48e9
    for local, size in ((0, 16), (8, 16), (16, 16), (16, 32), (4, 4)):
        assert world.slow_link(run, World(0, size, 0, "torchrun", local), flops, 0) is None
    said = world.slow_link(run, World(0, 16, 0, "torchrun", 4), flops, 0)
    assert said is not None
    # 4 x 32 sums of 4096 x 2 bytes, 14/8 of each sent, over 50 GB/s; 48 GFLOP on 8 GPUs at 0.4 x 989 TFLOP/s
    assert "parallel.tp = 8 leaves its machine, which has 4 ranks: each token then moves 1.8 MB" in said
    assert " 37 us over 50 GB/s between machines (4.1 us over 450 GB/s inside one) beside 15 us of" in said
    assert said.endswith("lower parallel.tp to a divisor of 4, or start a multiple of 8 ranks a machine")
