"""n GPUs equal one, over NCCL, in double precision: cells of tests/test_parity.py for every listed layout that fits.

    torchrun --nproc-per-node 4 tests/bench/nccl_parity.py
"""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_parity

from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import LAYOUTS


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    failed = 0
    for features in LAYOUTS:
        parallel, n = test_parity.layout(features)
        if n != size:
            continue
        began, cells, wrong = time.perf_counter(), test_parity.sample(features)[:3], []
        mesh = Mesh(parallel, device, rank, size)      # one a layout: every mesh holds communicators until the end
        for cell in cells:
            wrong += test_parity.on_mesh(mesh, cell)
        count = torch.tensor(len(wrong), device=device)
        dist.all_reduce(count)
        failed += int(count)
        if rank == 0:
            print(f"{test_parity.name(features):24} {len(cells)} cells, {int(count)} differences, "
                  f"{time.perf_counter() - began:.1f} s {wrong[:2] if wrong else ''}", flush=True)
    dist.destroy_process_group()
    if rank == 0:
        print(f"{torch.cuda.get_device_name()} x {size}, torch {torch.__version__}: {failed} differences")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
