"""Who this process is among the others. The only file that reads the environment of a launcher."""
from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank of those on this machine. `launcher` says who told."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "alone"

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

    def connect(self, device: torch.device, minutes: float = 10) -> None:
        """Join the process group of all ranks; a collective that takes longer than `minutes` ends the job."""
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo" if device.type == "cpu" else "nccl", rank=self.rank, world_size=self.size,
                                    timeout=timedelta(minutes=minutes),
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
    told = {k: os.environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if k in os.environ}
    if not all(v.isdecimal() for v in told.values()) or int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        raise ValueError(f"{', '.join(f'{k} = {v}' for k, v in told.items())} name no process of a group; "
                         "start with torchrun, or unset RANK to run alone")
    rank, size, local = int(told["RANK"]), int(told["WORLD_SIZE"]), int(told.get("LOCAL_RANK", told["RANK"]))
    return World(rank, size, local, "torchrun")
