"""Expert parallelism and FSDP over 1, 2, 4 GPUs: tokens/s, and how much of the communication is exposed.

    python tests/bench/scaling.py                  # starts itself under torchrun for each size that fits the machine

ep:    a 64-expert top-4 model, its rows fixed a GPU; ladder and standard wiring, and both with the rows staying at home
       ("none": wrong experts, the floor). Hidden share = (standard - ladder) / (standard - none of standard).
fsdp:  the dense 1.1B shape of tests/bench/dense.py, 8 x 2048 tokens a GPU, its whole training step.
"""
from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.decoder import blocks
from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.parallel.build import build
from stepladder.parallel.expert import Carry
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.pipeline import Micro
from stepladder.parallel.support import Parallel

LAGS = {"standard": (0, 0), "ladder": (1, 1), "none": (0, 0)}


def moe(small: bool) -> ModelConfig:
    D, H, F, E, layers = (64, 4, 32, 8, 2) if small else (2048, 16, 1024, 64, 8)
    block = BlockConfig(find(TOKEN, "attention").Spec(heads=H, kv_heads=H // 4, head_dim=D // H),
                        find(CHANNEL, "moe").Spec(experts=E, top_k=4, hidden=F))
    return ModelConfig(vocab=512 if small else 32768, width=D, layers=layers, blocks={"a": block}, pattern=("a",))


def dense(small: bool) -> ModelConfig:
    D, H, F, layers = (64, 4, 128, 2) if small else (2048, 32, 8192, 16)
    block = BlockConfig(find(TOKEN, "attention").Spec(heads=H, kv_heads=H // 4, head_dim=D // H),
                        find(CHANNEL, "swiglu").Spec(hidden=F))
    return ModelConfig(vocab=512 if small else 32768, width=D, layers=layers, blocks={"a": block}, pattern=("a",))


class Stay(Carry):
    """An exchange that leaves rows at home, at whichever local expert has the number: free communication."""

    def __init__(self, exchange: Any):
        super().__init__(exchange.lanes)
        self.n = exchange.ranks.n

    def dispatch(self, rows: torch.Tensor, announced: torch.Tensor) -> tuple[Any, torch.Tensor, Any]:
        return self.lanes.carry(rows), announced.view(self.n, -1).sum(0), None


def timed(step: Any, times: int, device: torch.device) -> list[float]:
    out = []
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        out.append(1e3 * (time.perf_counter() - began))
    return out


def experts(mesh: Mesh, small: bool) -> dict[str, float]:
    """Median ms of a pass forward and backward, by side."""
    parts = build(moe(small), mesh, seed=0, dtype=torch.bfloat16, compiled=mesh.device.type == "cuda")
    if mesh.device.type == "cuda":
        parts.decoder.to(torch.bfloat16)       # no casts from masters in the timing: they shrink with ep, too
    m = batch(parts.decoder.cfg, mesh, 2 if small else 4, 64 if small else 2048)
    real = {name: block.channel.experts.exchange for name, block in parts.decoder.blocks.items()}
    took = defaultdict(list)
    for i in range(4):
        for side, lag in LAGS.items():
            if side == "none" and mesh.ep == 1:
                continue
            for exchange, block in zip(real.values(), blocks(parts.decoder), strict=True):
                block.lag = lag
                block.channel.experts.exchange = Stay(exchange) if side == "none" else exchange  # pyright: ignore

            def step() -> None:
                parts.pipe([m])
                for p in parts.parameters().values():
                    p.grad = None
            times = timed(step, 6 if i else 3, mesh.device)
            took[side] += times[2:] if i else []
    return {side: median(x) for side, x in took.items()}


def sharded(mesh: Mesh, small: bool) -> dict[str, float]:
    """Median ms of a training step."""
    parts = build(dense(small), mesh, seed=0, dtype=torch.bfloat16, compiled=mesh.device.type == "cuda")
    optimizer = Optimizer(parts)
    m = batch(parts.decoder.cfg, mesh, 2 if small else 8, 64 if small else 2048)

    def step() -> None:
        result = parts.pipe([m])
        parts.sums()
        optimizer.step(result, 1e-4)
    return {"step": median(timed(step, 16, mesh.device)[6:])}


def batch(cfg: ModelConfig, mesh: Mesh, rows: int, length: int) -> Micro:
    gen = torch.Generator().manual_seed(mesh.dp_rank)
    tokens = torch.randint(cfg.vocab, (rows, length + 1), generator=gen).to(mesh.device)
    return Micro(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def rank(kind: str, small: bool) -> None:
    me, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    torch.set_float32_matmul_precision("high")
    layout = Parallel(ep=size, shard=False) if kind == "ep" else Parallel()
    gc.disable()
    ms = (experts if kind == "ep" else sharded)(Mesh(layout, device, me, size), small)
    if me == 0:
        tokens = 2 * 64 if small else (4 if kind == "ep" else 8) * 2048
        memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        print(json.dumps({"kind": kind, "gpus": size, "ms": ms, "memory": memory,
                          "tokens_per_s": {k: 1e3 * size * tokens / v for k, v in ms.items()}}), flush=True)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    small = "--small" in sys.argv
    if "RANK" in os.environ:
        return rank(sys.argv[1], small)
    have = torch.cuda.device_count() or 2
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for kind in ("ep", "fsdp"):
        for n in (n for n in (1, 2, 4) if n <= have):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
            done = subprocess.run([*launch, __file__, kind, *sys.argv[1:]], capture_output=True, text=True, timeout=120)
            lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
            if not lines:
                print(f"{kind} on {n}: no result\n{done.stderr[-1500:]}", flush=True)
                continue
            found[kind, n] = json.loads(lines[-1])
            print(lines[-1], flush=True)
    for (kind, n), r in found.items():
        one = found.get((kind, 1))
        for side, speed in r["tokens_per_s"].items():
            base = one["tokens_per_s"].get(side) if one else None
            print(f"{kind:5} {n} GPUs {side:9} {r['ms'][side]:8.2f} ms {speed:12,.0f} tokens/s {r['memory']:6.1f} GiB"
                  + (f"  {speed / n / base:.1%} of one GPU's, a GPU" if base else ""))
        if {"standard", "ladder", "none"} <= r["ms"].keys():
            a, b, c = (r["ms"][k] for k in ("standard", "ladder", "none"))
            print(f"      hidden by ladder: {(a - b) / max(1e-9, a - c):.0%} of {a - c:.2f} ms")


if __name__ == "__main__":
    main()
