"""What ladder hides: forward and backward of one stack under tensor parallelism, every wiring in one run, interleaved.

    torchrun --nproc-per-node 4 tests/bench/ladder.py                 # or 2; --tokens, --sequence, --trace FILE

Weights, shapes and kernels are the same on every side, only the wiring differs; "none" is the standard wiring with its
collectives left out (wrong sums, the floor). Hidden share = (standard - ladder) / (standard - none).
"""
from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import Decoder, blocks
from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.parallel.build import build
from stepladder.parallel.flight import Started
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel
from stepladder.parallel.tensor import TensorComm

LAGS = {"standard": (0, 0), "parallel": (0, 1), "ladder": (1, 1), "none": (0, 0)}


def shape(small: bool, layers: int) -> ModelConfig:
    """The 8B shape (width 4096, 32 heads, 8 of keys, hidden 14336), with a vocabulary that costs nothing."""
    D, H, G, F = (128, 8, 4, 256) if small else (4096, 32, 8, 14336)
    block = BlockConfig(find(TOKEN, "attention").Spec(heads=H, kv_heads=G, head_dim=D // H),
                        find(CHANNEL, "swiglu").Spec(hidden=F))
    return ModelConfig(vocab=512, width=D, layers=layers, blocks={"a": block}, pattern=("a",))


class Silent(TensorComm):
    """The same slices and no collectives: what every sublayer would take if communication were free."""

    def __init__(self, comm: TensorComm):
        super().__init__(comm.lanes, comm.ranks, comm.sequence)
        self.n = comm.ranks.n if comm.ranks is not None and comm.sequence else 1

    def spread(self, x: torch.Tensor) -> Started:
        return Started(x.repeat(1, self.n, 1) if self.n > 1 else x.detach())

    def collect(self, y: torch.Tensor) -> Started:
        return Started(y.chunk(self.n, 1)[0].contiguous() if self.n > 1 else y.detach())


def wire(decoder: Decoder, side: str, comm: Any) -> None:
    chosen = Silent(comm) if side == "none" else comm
    for block in blocks(decoder):
        block.lag, block.token_comm, block.channel_comm = LAGS[side], chosen, chosen
    decoder.embed_comm = chosen


class Pass:
    """Forward and backward of one side; on GPUs captured once and replayed, so that the host's calls cost nothing."""

    def __init__(self, decoder: Decoder, side: str, comm: Any, tokens: torch.Tensor, grad: torch.Tensor,
                 captured: bool):
        self.side, self.graphs = side, []
        wire(decoder, side, comm)

        def forward() -> torch.Tensor:
            return decoder(tokens, Context.plain(*tokens.shape, device=tokens.device)).read(0).h

        def backward(h: torch.Tensor) -> None:
            h.backward(grad)

        def both() -> None:
            decoder.zero_grad()
            backward(forward())

        self.parts = [lambda: setattr(self, "h", forward()), lambda: backward(self.h)]
        if not captured:
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                both()
        torch.cuda.synchronize()
        dist.barrier()
        decoder.zero_grad()
        pool = torch.cuda.graph_pool_handle()
        for part in self.parts:
            self.graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(self.graphs[-1], pool=pool, stream=stream, capture_error_mode="thread_local"):
                part()
        self.keep = [p.grad for p in decoder.parameters()]
        decoder.zero_grad()

    def __call__(self, decoder: Decoder, comm: Any) -> tuple[float, float, float]:
        """ms of forward, of backward, and of the host's calls for both."""
        wire(decoder, self.side, comm)
        gpu, marks, began = torch.cuda.is_available(), [], time.perf_counter()

        def mark() -> None:
            marks.append(torch.cuda.Event(enable_timing=True) if gpu else time.perf_counter())
            if gpu:
                marks[-1].record()

        mark()
        for part in self.graphs or self.parts:
            part.replay() if self.graphs else part()
            mark()
        host = 1e3 * (time.perf_counter() - began)
        if gpu:
            torch.cuda.synchronize()
        forward, backward = (a.elapsed_time(b) if gpu else 1e3 * (b - a) for a, b in pairwise(marks))
        return forward, backward, host


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--copies", action="store_true", help="collectives by copy engines")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--small", action="store_true", help="a shape for CPUs, to try this script")
    parser.add_argument("--sides", nargs="+", default=list(LAGS))
    parser.add_argument("--host", action="store_true", help="launch by the host instead of replaying a graph")
    parser.add_argument("--trace", help="write a profile of one pass of rank 0 to this file; SIDE becomes the side")
    parser.add_argument("--draw", nargs="+", help="no run: draw these traces, the last name being the picture's")
    parser.add_argument("--label", default="")
    args = parser.parse_args()
    if args.draw:
        return draw(args.draw[:-1], args.draw[-1])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    torch.set_float32_matmul_precision("high")
    cfg, dtype = shape(args.small, args.layers), torch.bfloat16 if gpu else torch.float32
    mesh = Mesh(Parallel(tp=size, sequence=args.sequence, copies=args.copies), device, rank, size)
    parts = build(cfg, mesh, seed=0, dtype=dtype, compiled=gpu and not args.eager)
    decoder = parts.decoder
    decoder.to(dtype)                      # as FSDP would hand them out: no casts from masters in the timing
    comm = decoder.embed_comm
    for n in args.tokens:
        tokens = torch.randint(cfg.vocab, (1, n), device=device)
        grad = torch.randn(1, n // size if args.sequence else n, cfg.width, device=device, dtype=dtype)
        took: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        sides = {side: Pass(decoder, side, comm, tokens, grad, gpu and not args.host) for side in args.sides}
        gc.disable()
        for i in range(args.rounds + 1):
            for side, run in sides.items():
                for j in range(8):
                    times = run(decoder, comm)
                    if args.host or not gpu:
                        decoder.zero_grad()
                    if i and j > 2:
                        took[side].append(times)
        gc.enable()
        if args.trace:
            for side, run in sides.items():
                trace(args.trace.replace("SIDE", side), rank, lambda run=run: run(decoder, comm))
        del sides
        free = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0
        if rank == 0:
            print(f"memory {free:.1f} GiB")
            report(args, n, size, took)
    sys.stdout.flush()
    os._exit(0)                            # a communicator that graphs still hold cannot be taken down


def report(args: argparse.Namespace, n: int, size: int, took: dict[str, list[tuple[float, float, float]]]) -> None:
    ms = {side: [median(x) for x in zip(*times, strict=True)] for side, times in took.items()}
    spread = {side: (min(sum(t[:2]) for t in times), max(sum(t[:2]) for t in times)) for side, times in took.items()}
    what = f"TP{size}{' SP' if args.sequence else ''}{' copies' if args.copies else ''}"
    print(f"{what} {n} tokens, {args.layers} layers {args.label}")
    for side, (f, b, host) in ms.items():
        print(f"  {side:9} forward {f:7.2f}  backward {b:7.2f}  both {f + b:7.2f} ms  ({spread[side][0]:.2f}-"
              f"{spread[side][1]:.2f}; host {host:.1f})")
    if {"standard", "ladder", "none"} <= ms.keys():
        share = lambda get: (get("standard") - get("ladder")) / max(1e-9, get("standard") - get("none"))
        parts = [share(lambda s, i=i: ms[s][i]) for i in (0, 1)]
        both = share(lambda s: ms[s][0] + ms[s][1])
        ratio = sum(ms["ladder"][:2]) / sum(ms["standard"][:2])
        print(f"  hidden: forward {parts[0]:.0%}, backward {parts[1]:.0%}, both {both:.0%}; "
              f"ladder/standard {ratio:.3f}", flush=True)
    print(json.dumps({"tp": size, "sp": args.sequence, "tokens": n, "label": args.label, "ms": ms}), flush=True)


def draw(traces: list[str], out: str, window: float = 4.0) -> None:
    """A picture of `window` ms of each trace, in the middle of its forward and of its backward."""
    from matplotlib import pyplot as plt

    kinds = {"communication": ("nccl", "Memcpy PtoP", "barrier", "memcpy128", "reduce_kernel"),
             "norms and sums": ("rms_norm",), "mixers": ("",)}
    colors = dict(zip(kinds, ("tab:red", "tab:orange", "tab:blue"), strict=True))
    figure, axes = plt.subplots(len(traces), 2, figsize=(16, 1.9 * len(traces)), squeeze=False)
    for row, path in zip(axes, traces, strict=True):
        with (gzip.open if path.endswith(".gz") else open)(path, "rt") as f:
            events = [e for e in json.load(f)["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy")]
        began = min(e["ts"] for e in events)
        length = max(e["ts"] + e["dur"] for e in events) - began
        for axis, at, name in zip(row, (0.17, 0.68), ("forward", "backward"), strict=True):
            for e in events:
                left = (e["ts"] - began - at * length) / 1e3
                if -0.5 < left < window:
                    kind = next(k for k, words in kinds.items() if any(w in e["name"] for w in words))
                    axis.broken_barh([(left, e["dur"] / 1e3)], (list(kinds).index(kind) + 0.1, 0.8),
                                     color=colors[kind], edgecolor="white", linewidth=0.4)
            axis.set(xlim=(0, window), ylim=(0, len(kinds)), yticks=[i + 0.5 for i in range(len(kinds))],
                     yticklabels=list(kinds), xlabel="ms")
            side = Path(path).name.split(".")[0].rpartition("-")[2]
            axis.set_title(f"{side}, {name} (whole pass {length / 1e3:.1f} ms)", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def trace(path: str, rank: int, run: Any) -> None:
    with torch.profiler.profile() as p:
        run()
    if rank == 0:
        p.export_chrome_trace(path)


if __name__ == "__main__":
    main()
