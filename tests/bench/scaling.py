"""Expert parallelism and FSDP over 1, 2, 4 GPUs: tokens/s, and how much of the communication is exposed.

    python tests/bench/scaling.py [ep pregated fsdp]      # starts itself under torchrun, once a size

ep:    a 64-expert top-4 model, its rows fixed a GPU; ladder and standard wiring, and with tokens that stay at home
       ("none": wrong experts, the floor); "copied": tokens by copy engines. Hidden share = (standard - ladder) /
       (standard - none of standard). "host" is how long the calls of a pass take, waiting for counts included.
pregated: the same with routers that choose for the next block.
fsdp:  the dense 1.1B shape of tests/bench/dense.py, 8 x 2048 tokens a GPU, its whole training step; "kept": with
       gathered weights kept for the backward pass; "4 CTAs": collectives leave the other multiprocessors to products.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.decoder import blocks
from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.parallel.build import build
from stepladder.parallel.expert import Carry
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.pipeline import Micro
from stepladder.parallel.support import Parallel

KINDS = "ep", "pregated", "fsdp"
LAGS = {"standard": (0, 0), "ladder": (1, 1), "standard copied": (0, 0), "ladder copied": (1, 1), "none": (0, 0)}

SHARDED = {"step": Parallel(), "kept": Parallel(reshard=False),
           "kept, 4 CTAs": Parallel(reshard=False, shard_ctas=4)}     # last: products of this process then leave room


def moe(small: bool, ahead: int) -> ModelConfig:
    D, H, F, E, layers = (64, 4, 32, 8, 2) if small else (2048, 16, 1024, 64, 8)
    block = BlockConfig(find(TOKEN, "attention").Spec(heads=H, kv_heads=H // 4, head_dim=D // H),
                        find(CHANNEL, "moe").Spec(experts=E, top_k=4, hidden=F, ahead=ahead))
    return ModelConfig(vocab=512 if small else 32768, width=D, layers=layers, blocks={"a": block}, pattern=("a",))


def dense(small: bool) -> ModelConfig:
    D, H, F, layers = (64, 4, 128, 2) if small else (2048, 32, 8192, 16)
    block = BlockConfig(find(TOKEN, "attention").Spec(heads=H, kv_heads=H // 4, head_dim=D // H),
                        find(CHANNEL, "swiglu").Spec(hidden=F))
    return ModelConfig(vocab=512 if small else 32768, width=D, layers=layers, blocks={"a": block}, pattern=("a",))


class Stay(Carry):
    """An exchange that leaves tokens at home, at whichever local experts have the numbers: free communication."""

    def __init__(self, exchange: Any):
        super().__init__(exchange.lanes)
        self.n = exchange.ranks.n

    def announce(self, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> Any:
        return super().announce(ids % (experts // self.n), weights, experts // self.n)


def timed(step: Any, times: int, device: torch.device) -> tuple[float, float]:
    """ms of a step, and of its calls alone: as in training the host may run ahead, so one measurement is of many."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        step()
    called = time.perf_counter()
    wait()
    return 1e3 * (time.perf_counter() - began) / times, 1e3 * (called - began) / times


def traced(step: Any, file: str, mesh: Mesh) -> None:
    if file:
        on = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if mesh.rank == 0 else []
        with profile(activities=on) if on else nullcontext() as seen:
            timed(step, 1, mesh.device)
        if seen is not None:
            seen.export_chrome_trace(file)


def experts(mesh: Mesh, small: bool, ahead: int, rows: int, trace: str) -> dict[str, float]:
    """Median ms of a pass forward and backward, by side, and of its calls."""
    parts = build(moe(small, ahead), mesh, seed=0, dtype=torch.bfloat16, compiled=mesh.device.type == "cuda")
    if mesh.device.type == "cuda":
        parts.decoder.to(torch.bfloat16)       # no casts from masters in the timing: they shrink with ep, too
    m = batch(parts.decoder.cfg, mesh, 2 if small else rows, 64 if small else 2048)
    real = [cast(Any, block.channel).experts.exchange for block in blocks(parts.decoder)]
    copied = getattr(real[0], "copies", None)

    def step() -> None:
        parts.pipe([m])
        for p in parts.parameters().values():
            p.grad = None

    took, host = defaultdict(list), defaultdict(list)
    for i in range(6):
        for side, lag in LAGS.items():
            if ("copied" in side and not copied) or (side == "none" and mesh.ep == 1):
                continue
            for exchange, block in zip(real, blocks(parts.decoder), strict=True):
                block.lag, inner = lag, cast(Any, block.channel).experts
                exchange.copies = copied if "copied" in side else None
                inner.exchange = Stay(exchange) if side == "none" else exchange
            ms, calls = timed(step, 4, mesh.device)
            if i:
                took[side].append(ms)
                host[side].append(calls)
            if i == 5:
                traced(step, trace.replace("SIDE", side.replace(" ", "-")), mesh)
    return {side: median(x) for side, x in took.items()} | {f"host {side}": median(x) for side, x in host.items()}


def sharded(mesh: Mesh, small: bool, trace: str) -> dict[str, float]:
    """Median ms of a training step, by side."""
    took = {}
    for side, layout in SHARDED.items():
        if mesh.size > 1 or side == "step":
            took[side] = trained(Mesh(layout, mesh.device, mesh.rank, mesh.size), small,
                                 trace.replace("SIDE", side.replace(", ", "-").replace(" ", "-")))
            gc.collect()                       # the model: it would stand in the memory of the next
    return took


def trained(mesh: Mesh, small: bool, trace: str) -> float:
    parts = build(dense(small), mesh, seed=0, dtype=torch.bfloat16, compiled=mesh.device.type == "cuda")
    optimizer = Optimizer(parts)
    m = batch(parts.decoder.cfg, mesh, 2 if small else 8, 64 if small else 2048)

    def step() -> None:
        result = parts.pipe([m])
        parts.sums()
        optimizer.step(result, 1e-4)

    timed(step, 3, mesh.device)
    ms = median(timed(step, 4, mesh.device)[0] for _ in range(3))
    traced(step, trace, mesh)
    return ms


def batch(cfg: ModelConfig, mesh: Mesh, rows: int, length: int) -> Micro:
    gen = torch.Generator().manual_seed(mesh.dp_rank)
    tokens = torch.randint(cfg.vocab, (rows, length + 1), generator=gen).to(mesh.device)
    return Micro(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def rank(kind: str, args: argparse.Namespace) -> None:
    me, size, small = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), args.small
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    torch.set_float32_matmul_precision("high")
    mesh = Mesh(Parallel() if kind == "fsdp" else Parallel(ep=size, shard=False, copies=gpu), device, me, size)
    gc.disable()
    trace = args.trace.replace("KIND", f"{kind}{size}")
    if kind == "fsdp":
        ms = sharded(mesh, small, trace)
    else:
        ms = experts(mesh, small, int(kind == "pregated"), args.rows, trace)
    if me == 0:
        tokens = 2 * 64 if small else (8 if kind == "fsdp" else args.rows) * 2048
        memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        print(json.dumps({"kind": kind, "gpus": size, "ms": ms, "memory": memory,
                          "tokens_per_s": {k: 1e3 * size * tokens / v for k, v in ms.items() if "host" not in k}}),
              flush=True)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=[*KINDS], help=", ".join(KINDS))
    parser.add_argument("--small", action="store_true", help="a toy, to try this script")
    parser.add_argument("--rows", type=int, default=4, help="of 2048 tokens a GPU, for ep and pregated")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="GPUs")
    parser.add_argument("--trace", default="", help="a file for Chrome's tracing, KIND and SIDE in its name replaced")
    args = parser.parse_args()
    if unknown := {*args.kinds} - {*KINDS}:             # choices would refuse the default of nargs="*"
        parser.error(f"kinds are {', '.join(KINDS)}, not {', '.join(unknown)}")
    if "RANK" in os.environ:
        return rank(args.kinds[0], args)
    have = torch.cuda.device_count() or 2
    options = [f"--trace={args.trace}", f"--rows={args.rows}", *(["--small"] if args.small else [])]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for kind in args.kinds:
        for n in (n for n in args.sizes if n <= have):
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
            done = subprocess.run([*launch, __file__, kind, *options], capture_output=True, text=True, timeout=120)
            lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
            if not lines:
                print(f"{kind} on {n}: no result\n{done.stderr[-8000:]}", flush=True)
                continue
            found[kind, n] = json.loads(lines[-1])
            print(lines[-1], flush=True)
    for (kind, n), r in found.items():
        one = found.get((kind, 1))
        for side, speed in r["tokens_per_s"].items():
            alone = one["tokens_per_s"] if one else {}
            base = alone.get(side, alone.get("step"))            # one GPU keeps its weights anyway
            host = f" host {r['ms'][f'host {side}']:.1f}" if f"host {side}" in r["ms"] else ""
            print(f"{kind:8} {n} GPUs {side:15} {r['ms'][side]:8.2f} ms{host} {speed:12,.0f} tokens/s "
                  f"{r['memory']:6.1f} GiB" + (f"  {speed / n / base:.1%} of one GPU's, a GPU" if base else ""))
        for how in ("", " copied"):
            if {f"standard{how}", f"ladder{how}", "none"} <= r["ms"].keys():
                a, b, c = (r["ms"][k] for k in (f"standard{how}", f"ladder{how}", "none"))
                print(f"      hidden by ladder{how}: {(a - b) / max(1e-9, a - c):.0%} of {a - c:.2f} ms")


if __name__ == "__main__":
    main()
