"""n GPUs equal one, over NCCL, in double precision: some models of tests/matrix.py on every layout that fits.

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
import matrix
import test_parity

from stepladder.parallel.mesh import Mesh


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    failed = 0
    for name, cells in matrix.selection().items():
        parallel, n = matrix.LAYOUTS[name]
        if n != size:
            continue
        began, wrong = time.perf_counter(), []
        mesh = Mesh(parallel, device, rank, size)      # one a layout: every mesh holds communicators until the end
        for cell in cells[:3]:
            wrong += test_parity.on_mesh(mesh, cell)
        count = torch.tensor(len(wrong), device=device)
        dist.all_reduce(count)
        failed += int(count)
        if rank == 0:
            print(f"{name:36} {len(cells[:3])} models, {int(count)} differences, "
                  f"{time.perf_counter() - began:.1f} s {wrong[:2] if wrong else ''}", flush=True)
    dist.destroy_process_group()
    if rank == 0:
        print(f"{torch.cuda.get_device_name()} x {size}, torch {torch.__version__}: {failed} differences")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
