"""Who this process is among the others. The only file that reads the environment of a launcher."""
from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from stepladder.launch.config import Run

# Bytes a second and GPU, of one 400 Gbit/s adapter each and of NVLink 4, one way: what the data sheets promise.
BETWEEN_NODES, INSIDE_A_NODE = 50e9, 450e9
H100 = 989e12                    # dense bf16 FLOP/s; assumed where the device is unknown


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank of those on this machine. `launcher` says who told."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "alone"
    local_size: int = 0          # processes on this machine; 0: nobody told

    @property
    def main(self) -> bool:
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This rank's device; ValueError if the machine has too few."""
        if kind == "cpu":
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(f"rank {self.rank} is number {self.local_rank} on this machine, which has "
                             f"{torch.cuda.device_count()} GPUs; start fewer processes here, or set train.device=cpu")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def meet(self) -> dist.Store | None:
        """The store through which ranks speak before any of them touches a GPU; none for one rank alone."""
        if self.size == 1:
            return None
        if dist.is_initialized():
            return dist.distributed_c10d._get_default_store()
        return next(dist.rendezvous("env://", self.rank, self.size))[0]

    def connect(self, device: torch.device, store: dist.Store | None, limit: timedelta) -> None:
        """Join the process group of all ranks; torch ends a collective that takes longer than `limit`."""
        if store is not None and not dist.is_initialized():
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=dist.PrefixStore("group", store),
                                    rank=self.rank, world_size=self.size, timeout=limit,
                                    device_id=device if device.type == "cuda" else None)


def find() -> World:
    """The world as torchrun describes it, or one process alone."""
    if dist.is_initialized():          # a test has made the group already
        return World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), "given")
    if "RANK" not in os.environ:
        return World()
    missing = [k for k in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise ValueError(f"RANK = {os.environ['RANK']} is set but {' and '.join(missing)} not; "
                         "start with torchrun, or unset RANK to run alone")
    told = {k: os.environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if k in os.environ}
    if not all(v.isdecimal() for v in told.values()) or int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise ValueError(f"{', '.join(f'{k} = {v}' for k, v in told.items())} name no process of a group; "
                         "start with torchrun, or unset RANK to run alone")
    rank, size, local = int(told["RANK"]), int(told["WORLD_SIZE"]), int(told.get("LOCAL_RANK", told["RANK"]))
    return World(rank, size, local, "torchrun", int(told.get("LOCAL_WORLD_SIZE", 0)))


def slow_link(run: Run, w: World, flops: float, peak: float) -> str | None:
    """A warning where tensor parallelism leaves the machine, with what it costs. flops: of a token, both passes."""
    tp, local = run.parallel.tp, w.local_size
    if not local or local >= w.size or local % tp == 0:
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
