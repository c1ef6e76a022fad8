"""Who this process is among the others. The only file that reads the environment of a launcher."""
from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from ipaddress import ip_address

import torch
import torch.distributed as dist

from stepladder.launch import agree
from stepladder.launch.config import Run

# Bytes a second and GPU, of one 400 Gbit/s adapter each and of NVLink 4, one way: what the data sheets promise.
BETWEEN_NODES, INSIDE_A_NODE = 50e9, 450e9
H100 = 989e12                    # dense bf16 FLOP/s; assumed where the device is unknown
PATIENCE = 20.0                  # seconds of silence at the rendezvous
AGAIN = 0.2                      # seconds between two attempts to reach rank 0
PARENTS = "torchrun", "DeepSpeed's launcher"    # start ranks as children, and leave them behind when they are killed
NOBODY = "RANK and WORLD_SIZE"   # the launcher of processes whose variables no launcher signed
MPI = {                          # rank, size, and those on this machine
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}

LISTED = re.compile(r"SLURM_(JOB|N|TASKS|CPUS|GPUS|RESTART)|CUDA_|NCCL_|GLOO_|OMP_|TORCH_|PYTORCH_|LD_LIBRARY_PATH$")
SECRET = re.compile(r"token|secret|key|pass|jwt", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank of those on this machine. `launcher` says who told."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "alone"
    local_size: int = 0          # processes on this machine; 0: nobody told
    node: int = 0                # number of this machine
    address: str = ""            # host:port of the store through which ranks come together
    held: bool = False           # it is the launcher's own; else rank 0 makes it
    attempt: int = 0             # how often this machine's launcher started its processes before

    @property
    def main(self) -> bool:
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This rank's device; ValueError if the machine has too few, or GPUs that no process would use."""
        if kind == "cpu":
            return torch.device("cpu")
        gpus, index = torch.cuda.device_count(), self.local_rank
        if self.launcher == "Slurm" and gpus == 1:           # --gpus-per-task=1 shows each task its own as number 0
            index = 0
        elif self.launcher == "Slurm" and gpus > self.local_size:
            raise ValueError(f"Slurm started {_tasks(self.local_size)} on this machine, which shows {gpus} GPUs; start "
                             f"one for each (srun --ntasks-per-node={gpus}), torchrun --nproc-per-node {gpus} in one "
                             "task, or hide GPUs with CUDA_VISIBLE_DEVICES")
        if index >= gpus:
            raise ValueError(f"rank {self.rank} is number {self.local_rank} on this machine, which has "
                             f"{gpus} GPUs; start fewer processes here, or set train.device=cpu")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def meet(self, minutes: float = 0) -> dist.Store | None:
        """The store through which ranks speak before any of them touches a GPU; None for one rank alone.

        minutes: wait for all, else agree.Missing says who did not come; 0: do not wait, and the store may be used."""
        if self.size == 1:
            return None
        if dist.is_initialized():
            return dist.distributed_c10d._get_default_store()
        patience = threading.Timer(PATIENCE, lambda: print(
            f"rank {self.rank} of {self.size} still waits for others to come", file=sys.stderr, flush=True))
        patience.daemon = True
        patience.start()
        try:
            store = self._store(minutes or agree.START)
            return agree.on_the_start(store, self.rank, self.size, minutes) if minutes else store
        finally:
            patience.cancel()

    def _store(self, minutes: float) -> dist.Store:
        """Rank 0 listens on the interface of its address; torch's own store would listen on all of them."""
        host, _, port = self.address.rpartition(":")
        if self.main and not self.held:
            return dist.TCPStore(host, int(port), self.size, True, wait_for_workers=False,
                                 master_listen_fd=listen(host, int(port)).detach())
        end = time.monotonic() + 60 * minutes
        while True:           # torch would wait for its own limit, twice, and say a page of C++
            try:
                socket.create_connection((host, int(port)), PATIENCE).close()
                return dist.TCPStore(host, int(port), self.size)
            except OSError as error:
                if time.monotonic() > end:
                    raise agree.Missing(f"rank {self.rank} did not reach rank 0 at {self.address} within {minutes:g} "
                                        f"minutes ({error.strerror or error}); look at what was said there last"
                                        ) from None
                time.sleep(AGAIN)

    def export(self, device: torch.device) -> None:
        """Say in the environment what DeepSpeed looks for there, whoever started this process."""
        local = self.local_rank if device.index is None else device.index
        os.environ.update(LOCAL_RANK=str(local), DS_ACCELERATOR=device.type)

    def connect(self, device: torch.device, store: dist.Store | None, limit: timedelta) -> None:
        """Join the process group of all ranks; torch ends a collective that takes longer than `limit`."""
        if store is not None and not dist.is_initialized():
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=dist.PrefixStore("group", store),
                                    rank=self.rank, world_size=self.size, timeout=limit,
                                    device_id=device if device.type == "cuda" else None)


def listen(host: str, port: int) -> socket.socket:
    """A socket on the interface of this address alone.

    Many a machine calls its own name 127.0.1.1, where no other machine could reach it: such a name means all.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own_name = ip_address(where[0]).is_loopback and host not in (where[0], "localhost")
        return socket.create_server(("", port) if own_name else where[:2], family=family)
    except OSError as error:
        raise ValueError(f"rank 0 cannot listen on {host}:{port} ({error.strerror}); the master's address must be one "
                         "of rank 0's machine, and its port free") from None


def find() -> World:
    """The world as a launcher describes it, or one process alone; ValueError where two descriptions contradict."""
    if dist.is_initialized():          # a test has made the group already
        return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), "given")
    return told(os.environ)


def settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of an environment changes how a run goes. No more of it is ever kept: it may hold secrets."""
    return {name: env[name] for name in sorted(env) if LISTED.match(name) and not SECRET.search(name)}


def told(env: Mapping[str, str]) -> World:
    """The world that an environment describes."""
    named, mpi, slurm = _named(env), _mpi(env), _slurm(env)
    if named and named.launcher == NOBODY:      # set by hand, perhaps for all processes of a launcher that counts too
        for other in filter(None, (mpi, slurm)):
            if (other.rank, other.size) != (named.rank, named.size):
                raise ValueError(f"RANK = {named.rank} and WORLD_SIZE = {named.size}, but {other.launcher} says rank "
                                 f"{other.rank} of {other.size}; unset RANK and WORLD_SIZE")
    if named:      # torchrun and DeepSpeed's launcher may well be started by Slurm or MPI, once a machine
        return named
    if mpi and not (slurm and (slurm.rank, slurm.size) == (mpi.rank, mpi.size)):
        return replace(mpi, address=_mpi_address(mpi)) if mpi.size > 1 else mpi
    if not slurm and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        raise ValueError(f"this is the batch script of a job of {env['SLURM_NTASKS']} tasks, and would train alone; "
                         "put srun or torchrun before the command, or ask for --ntasks=1")
    return slurm or World()


def _named(env: Mapping[str, str]) -> World | None:
    """torchrun, DeepSpeed's launcher, or whoever set RANK."""
    if "RANK" not in env:
        return None
    missing = [k for k in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
    if missing:
        raise ValueError(f"RANK = {env['RANK']} is set but {' and '.join(missing)} not; "
                         "start with torchrun, or unset RANK to run alone")
    told = {k: env[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if k in env}
    if not all(v.isdecimal() for v in told.values()) or int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise ValueError(f"{', '.join(f'{k} = {v}' for k, v in told.items())} name no process of a group; "
                         "start with torchrun, or unset RANK to run alone")
    rank, size, local = int(told["RANK"]), int(told["WORLD_SIZE"]), int(told.get("LOCAL_RANK", told["RANK"]))
    address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if "TORCHELASTIC_RUN_ID" in env:
        return World(rank, size, local, "torchrun", int(told.get("LOCAL_WORLD_SIZE", 0)), int(env.get("GROUP_RANK", 0)),
                     address, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                     int(env.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if "CROSS_SIZE" in env and "LOCAL_SIZE" in env:
        return World(rank, size, local, "DeepSpeed's launcher", int(env["LOCAL_SIZE"]), int(env["CROSS_RANK"]), address)
    return World(rank, size, local, NOBODY, int(told.get("LOCAL_WORLD_SIZE", 0)), address=address)


def _slurm(env: Mapping[str, str]) -> World | None:
    """A task of srun. The batch script itself is none: it has a SLURM_PROCID, but no step."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    node, nodes = int(env["SLURM_NODEID"]), int(env["SLURM_STEP_NUM_NODES"])
    host = "127.0.0.1" if nodes == 1 else first_host(env["SLURM_STEP_NODELIST"])
    attempt = int(env.get("SLURM_RESTART_COUNT", 0))
    # Steps and jobs of one machine must not meet; ports from 32768 on are given to whoever asks.
    port = 12000 + (7 * int(env["SLURM_JOB_ID"]) + 3 * int(env["SLURM_STEP_ID"]) + attempt) % 20000
    return World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]), "Slurm",
                 _tasks_of(env["SLURM_STEP_TASKS_PER_NODE"])[node], node, f"{host}:{port}", attempt=attempt)


def first_host(nodes: str) -> str:
    """gpu[003-007,12],login -> gpu003: where Slurm puts rank 0. A prefix ends at the comma outside of brackets."""
    head = re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)
    if head is None:
        raise ValueError(f"SLURM_STEP_NODELIST = {nodes!r} names no host; start with torchrun instead")
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", head[0])


def _tasks_of(spelled: str) -> list[int]:
    """2(x3),1 -> 2, 2, 2, 1: tasks of each node."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", spelled)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _tasks(n: int) -> str:
    return f"{n} task{'s' * (n > 1)}"


def _mpi(env: Mapping[str, str]) -> World | None:
    """A process of mpiexec: Open MPI, or MPICH and what descends from it."""
    for launcher, names in MPI.items():
        if names[0] in env and names[1] in env:
            rank, size, local, local_size = (int(env.get(name, default)) for name, default in
                                             zip(names, ("0", "1", env[names[0]], "0"), strict=True))
            return World(rank, size, local, launcher, local_size)
    return None


def _mpi_address(w: World) -> str:
    """Where rank 0 waits: it chooses a free port, and MPI tells the others."""
    try:
        mpi = import_module("mpi4py.MPI")       # here: importing it starts MPI
    except Exception as error:                  # missing: ImportError; of another MPI than mpiexec's: RuntimeError
        raise ValueError(f"{w.launcher} started this, but package mpi4py does not load ({type(error).__name__}: {error}"
                         "); pip install 'stepladder[mpi]' brings it, and torchrun does without") from None
    world = mpi.COMM_WORLD
    if world.size != w.size:
        raise ValueError(f"{w.launcher} says {w.size} processes, but mpi4py {world.size}: it was made for another MPI; "
                         "use the mpiexec of mpi4py's MPI, or torchrun")
    address = ""
    if w.main:
        host = "127.0.0.1" if w.local_size == w.size else socket.gethostname()
        with socket.create_server(("", 0)) as free:
            address = f"{host}:{free.getsockname()[1]}"
    return world.bcast(address)


def refuse_far_copies(run: Run, w: World) -> None:
    """Raises ValueError for copy engines that would have to reach another machine."""
    for axis, n in (("tp", run.parallel.tp), ("ep", run.parallel.ep)):
        if run.parallel.copies and _far(n, w):
            raise ValueError(f"parallel.copies = true copies between GPUs of one machine, but parallel.{axis} = {n} "
                             f"leaves its machine, which has {w.local_size} ranks; set it to false")


def _far(n: int, w: World) -> bool:
    """Whether groups of n neighbours leave the machine, as far as a launcher told."""
    return 0 < w.local_size < w.size and w.local_size % n != 0


def slow_link(run: Run, w: World, flops: float, peak: float) -> str | None:
    """A warning where tensor parallelism leaves the machine, with what it costs. flops: of a token, both passes."""
    tp, local = run.parallel.tp, w.local_size
    if not _far(tp, w):
        return None
    size = 8 if run.train.dtype == "fp64" else 4 if run.train.dtype == "fp32" else 2
    # A ring moves 2 (n - 1) / n of a tensor; a layer sums four, two of them in the backward pass.
    sent = 4 * run.model.layers * 2 * (tp - 1) / tp * run.model.width * size
    work = flops / tp / (0.4 * (peak or H100))
    between, inside = sent / BETWEEN_NODES, sent / INSIDE_A_NODE
    return (f"warning: parallel.tp = {tp} leaves its machine, which has {local} ranks: each token then moves "
            f"{sent / 1e6:.2g} MB a rank, {between * 1e6:.2g} us over {BETWEEN_NODES / 1e9:.0f} GB/s between machines "
            f"({inside * 1e6:.2g} us over {INSIDE_A_NODE / 1e9:.0f} GB/s inside one) beside {work * 1e6:.2g} us of "
            f"compute at 40 % MFU; lower parallel.tp to a divisor of {local}, or start a multiple of {tp} ranks a "
            "machine")
