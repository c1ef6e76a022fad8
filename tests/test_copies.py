"""parallel/copies.py against NCCL on every GPU there is."""
from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from stepladder.parallel.copies import Copies, Rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def compared(rank: int, n: int, rendezvous: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=n, device_id=device)
    copies, busy = Copies(dist.group.WORLD, device), torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)  # pyright: ignore
    for i in range(60):                 # buffers are used again and again, while the front lane is busy
        gen = torch.Generator(device).manual_seed(100 * i + rank)
        y = torch.randn([(4096, 4096), (128, 64), (2, 256, 512)][i % 3], device=device, generator=gen).bfloat16()
        every = [torch.empty_like(y) for _ in range(n)]
        dist.all_gather(every, y)
        whole, parts = torch.stack(every), y.view(n, -1)
        wanted = whole.sum(0), whole, whole.view(n, n, -1)[:, rank].sum(0)
        for call, x, want in zip((copies.add_up, copies.gather, copies.scatter), (y, y, parts), wanted, strict=True):
            busy @ busy
            got, done = call(x)
            busy @ busy
            done.wait()
            assert torch.equal(got, want), f"{call.__name__} of {tuple(x.shape)}, call {i}"
    y, graph = torch.empty(512, 4096, device=device), torch.cuda.CUDAGraph()
    copies.add_up(y)
    with torch.cuda.graph(graph):
        got, done = copies.add_up(y)
        done.wait()
        got = got + 0
        gathered, done = copies.gather(y)
        done.wait()
        gathered = gathered + 0
    for _ in range(20):
        y.normal_()
        graph.replay()
        want, whole = y.clone(), y.new_empty(n, *y.shape)
        dist.all_gather(list(whole), y)
        dist.all_reduce(want)
        torch.testing.assert_close(got, want)
        assert torch.equal(gathered, whole)
    torch.cuda.synchronize()
    dist.barrier()
    os._exit(0)                         # a communicator that a graph still holds cannot be taken down


def travelled(rank: int, n: int, rendezvous: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=n, device_id=device)
    rows, busy = Rows(dist.group.WORLD, device), torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)  # pyright: ignore
    same, all_of_them = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(rank)
    for i in range(60):
        N = [40, 3000, 20000][i % 3]
        counts = torch.randint(0, N + 1, (n, n), generator=same) * (torch.arange(n) != i % (2 * n))
        send, receive = counts[rank].tolist(), counts[:, rank].tolist()
        x = torch.randn(N, 512, device=device, generator=all_of_them).bfloat16()
        which = [torch.randperm(N, device=device, generator=all_of_them)[:many] for many in send]
        rows.room(x)
        busy @ busy
        got, done = rows.there(x, which, receive)
        busy @ busy
        done.wait()
        come, home = got.new_empty(sum(receive), 512), got.new_empty(sum(send), 512)
        dist.all_to_all_single(come, x[torch.cat(which)], receive, send)
        assert torch.equal(got, come), f"call {i} there"
        y = 2 * got
        busy @ busy
        box, done, land = rows.home(y, receive, N, torch.clone)
        busy @ busy
        done.wait()
        back = torch.cat([part[:many] for part, many in zip(land(box).split(N), send, strict=True)])
        dist.all_to_all_single(home, y, send, receive)
        assert torch.equal(back, home), f"call {i} back"
    torch.cuda.synchronize()
    dist.barrier()
    os._exit(0)


def test_private_symmetric_memory_carries_what_nccl_would() -> None:
    for call in compared, travelled:
        with tempfile.TemporaryDirectory() as folder:
            spawn(call, (torch.cuda.device_count(), f"{folder}/rendezvous"), nprocs=torch.cuda.device_count())
