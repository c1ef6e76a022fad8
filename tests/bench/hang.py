"""What becomes of a run when a rank sleeps, dies or fails: two ranks, real collectives, and the sentence of the other.

    python tests/bench/hang.py            # two GPUs, NCCL; under two minutes
    python tests/bench/hang.py --cpu      # gloo

On GPUs first what following a collective costs: microseconds a call, and memory that the held handles keep.
"""
from __future__ import annotations

import argparse
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel
from stepladder.parallel.watch import watch

LIMIT = 10.0


def step(x: torch.Tensor, mesh: Mesh, number: int) -> None:
    watch.step(number)
    for block in range(8):
        work = dist.all_reduce(x.clone(), group=mesh.group("tp"), async_op=True)
        assert work is not None
        watch.track(work, "all-reduce", f"blocks.{block}.token").wait()


def rank(rank: int, port: int, cpu: bool, crime: str) -> None:
    device = torch.device("cpu") if cpu else torch.device("cuda", rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    if not cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if cpu else "nccl", store=dist.PrefixStore("group", store), rank=rank, world_size=2,
                            timeout=timedelta(seconds=10 * LIMIT), device_id=None if cpu else device)
    mesh = Mesh(Parallel(tp=2), device, rank, 2, timedelta(seconds=10 * LIMIT))
    x = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    with watch.over(mesh, store, LIMIT):
        for number in range(1, 6):
            if rank == 1 and number == 5:
                commit(crime)
            step(x, mesh, number)
            float(x[0, 0])
        if crime == "nothing" and not cpu:
            cost(x, mesh)


def commit(crime: str) -> None:
    if crime == "sleeps":
        time.sleep(10 * LIMIT)
    if crime == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if crime == "fails":
        raise ValueError("shard 7 is torn")


def cost(x: torch.Tensor, mesh: Mesh) -> None:
    kept, took = [], []
    for on in (False, True):
        watch.on = on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        step(x, mesh, 6)
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        small = torch.ones(8, device=x.device)
        began = time.perf_counter()
        for _ in range(1000):
            work = dist.all_reduce(small, group=mesh.group("tp"), async_op=True)
            assert work is not None
            watch.track(work, "all-reduce", "x").wait()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    if mesh.rank == 0:
        print(f"following: {(took[1] - took[0]) * 1e3:.1f} us a call beside {took[0] * 1e3:.1f} of a small all-reduce; "
              f"handles keep {kept[1] / 2**20:.0f} MiB after 8 of {x.nbytes / 2**20:.0f} MiB each", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    cpu = parser.parse_args().cpu
    spawn = get_context("spawn")
    for crime in ("nothing", "sleeps", "is killed", "fails"):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        print(f"--- rank 1: {crime}, limit {LIMIT:.0f} s", flush=True)
        ranks = [spawn.Process(target=rank, args=(r, store.port, cpu, crime)) for r in range(2)]
        for p in ranks:
            p.start()
        began = time.perf_counter()
        ranks[0].join(6 * LIMIT)
        print(f"rank 0: exit code {ranks[0].exitcode}, {time.perf_counter() - began:.0f} s after the start", flush=True)
        for p in ranks:
            p.kill()
            p.join()


if __name__ == "__main__":
    main()
