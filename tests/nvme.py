"""ZeRO-3 that keeps weights and moments on a disk: the losses of FSDP2, and the files while they are there.

Not a part of the suite: DeepSpeed first compiles its reader, for minutes, and swaps nothing smaller than a MiB.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import ranks
import torch
from test_deepspeed import CPU
from tiny import micro

from stepladder.launch.world import World
from stepladder.model.channel.swiglu import Spec as SwiGLU
from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.token.attention import Spec as Attention
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.support import Parallel

BLOCK = BlockConfig(Attention(heads=8, kv_heads=8, head_dim=128), SwiGLU(2048), (0, 0))
MODEL = ModelConfig(vocab=1024, width=1024, layers=2, blocks={"full": BLOCK}, pattern=("full",))


def losses(rank: int, n: int, parallel: Parallel, dtype: torch.dtype, steps: int) -> tuple[list[float], list[int]]:
    """Losses, and the sizes of the files on the disk after the last step."""
    World(rank, n, rank).export(CPU)
    parts = build(MODEL, Mesh(parallel, CPU, rank, n), seed=1, dtype=dtype)
    adam, seen = Optimizer(parts), []
    for at in range(steps):
        result = parts.pipe([micro(2, 32, seed=10 * at + rank), micro(2, 32, seed=10 * at + rank + n)])
        parts.sums()
        seen.append(float(adam.step(result, 1e-3).loss))
    weights = adam.state()                                        # read back from the disk, and written there
    for name, t in weights.items():
        assert bool((t.to_local() if hasattr(t, "to_local") else t).isfinite().all()), name      # pyright: ignore
    adam.loaded()
    result = parts.pipe([micro(2, 32, seed=rank)])
    parts.sums()
    seen.append(float(adam.step(result, 1e-3).loss))
    torch.distributed.barrier()
    files = [f.stat().st_size for f in Path(parallel.nvme).rglob("*.swp")] if parallel.nvme else []
    torch.distributed.barrier()
    parts.pipe.close()
    return seen, files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("disk", nargs="?", default=".", help="a folder on a local disk")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().disk) as folder:
        zero = {"engine": "deepspeed", "offload": True}
        for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-3)):
            want, _ = ranks.run(2, losses, Parallel(), dtype, 6, timeout=900)[0]
            got, files = ranks.run(2, losses, Parallel(**zero, nvme=folder), dtype, 6, timeout=900)[0]
            error = max(abs(a - b) / b for a, b in zip(got, want, strict=True))
            print(f"{dtype}: {len(files)} files of {sum(files) / 1e6:.0f} MB; losses {got[0]:.4f} to {got[-1]:.4f}, "
                  f"within {error:.0e} of FSDP2's", flush=True)
            assert error < close
            assert len(files) > 10
            assert not [*Path(folder).iterdir()]                  # gone with the run
    return 0


if __name__ == "__main__":
    sys.exit(main())
