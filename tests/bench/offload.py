"""What offloading saves of a GPU, and costs: the dense 1.1B model of dense.py under FSDP2 and DeepSpeed, one by one.

    OMP_NUM_THREADS=16 python tests/bench/offload.py [--small] [DISK]      # with a folder on a local disk: NVMe, too

Prints milliseconds of a step (median of the last five of eight) and the most GPU memory that tensors took.
"""
from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import median

import torch
from scaling import batch, dense

from stepladder.launch.world import World
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.support import Parallel

ROWS, LENGTH = 8, 2048


def measure(name: str, layout: dict[str, object], small: bool) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    World().export(device)
    torch.set_float32_matmul_precision("high")
    mesh = Mesh(Parallel(**layout), device)  # pyright: ignore[reportArgumentType]
    parts = build(dense(small), mesh, seed=0, dtype=torch.bfloat16, recompute="both")
    adam, took = Optimizer(parts), []
    m = batch(dense(small), mesh, 2 if small else ROWS, 64 if small else LENGTH)
    for _ in range(8):
        began = time.perf_counter()
        result = parts.pipe([m])
        parts.sums()
        loss = float(adam.step(result, 1e-4).loss)
        took.append(1e3 * (time.perf_counter() - began))
    parts.pipe.close()
    memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    print(f"{name:24} {median(took[3:]):10.1f} ms {memory:6.1f} GiB  loss {loss:.4f}", flush=True)


def main() -> None:
    if "--of" in sys.argv:
        return measure(*json.loads(sys.argv[-1]))
    small, disk = "--small" in sys.argv, [x for x in sys.argv[1:] if x != "--small"]
    zero = {"engine": "deepspeed"}
    layouts = {"fsdp": {}, "fsdp offload": {"offload": True}, "zero2": zero | {"zero": 2}, "zero3": zero,
               "zero2 offload": zero | {"zero": 2, "offload": True}, "zero3 offload": zero | {"offload": True}}
    layouts |= {"zero3 nvme": zero | {"offload": True, "nvme": disk[0]}} if disk else {}
    for name, layout in layouts.items():
        subprocess.run([sys.executable, __file__, "--of", json.dumps([name, layout, small])], check=False)


if __name__ == "__main__":
    main()
