"""One GPU: time and memory of a layer against the length of its row, attention and every mixer; as a table and a plot.

    python tests/bench/lengths.py [--layers attention gla ...] [--lengths 2048 ... 262144] [--seconds 540]
                                  [--out lengths.png]
    python tests/bench/lengths.py --small --device cpu            a toy, to try this script

One row of T tokens, a layer of layers.py, compiled for this length. Time is of forward and backward, the median between
CUDA events; memory their peak above weights and input; a decode step is that of one row after T tokens, played back
from a CUDA graph. A layer that is out of memory is not tried at greater lengths.
"""
from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from layers import AHEAD, BIG, SMALL, Sizes, forward, ours, side
from timing import milliseconds, peak
from torch import Tensor

from stepladder.model.context import Context
from stepladder.model.mixer import TokenMixer
from stepladder.model.registry import TOKEN


class Point(NamedTuple):
    T: int
    both: float        # forward and backward, ms
    memory: float      # GiB
    step: float        # ms


def middle(f: Callable[[], Any], device: torch.device) -> float:
    """The median of up to nine, ms; long ones have two seconds."""
    f()
    times = [milliseconds(f, device.type == "cuda", AHEAD)]
    while len(times) < 9 and sum(times) < 2_000:
        times.append(milliseconds(f, device.type == "cuda", AHEAD))
    return median(times)


@torch.no_grad()
def decode(layer: TokenMixer, T: int, x: Tensor) -> float:
    """ms of one more token (1, 1, D) for a row of T. Attention reads its whole ring, whatever is in it."""
    state, ctx = layer.begin(1, T, x), Context.after(torch.full((1,), T, device=x.device), 1)
    ctx = ctx._replace(table=layer.table(ctx, torch.float32))
    step = lambda: layer.step(x, state, ctx)
    if not x.is_cuda:
        return middle(step, x.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return middle(graph.replay, x.device)


def measure(kind: str, T: int, sizes: Sizes, device: torch.device) -> Point:
    torch.compiler.reset()                   # what it compiled for other lengths is not needed any more
    torch.manual_seed(0)
    layer = ours(kind, sizes, device, compiled=device.type == "cuda")
    x = torch.randn(1, T, sizes.width, dtype=torch.bfloat16, device=device, requires_grad=True)
    one = side("ours", layer, forward(layer, 1, T, device), x)
    both = middle(one.both, device)
    return Point(T, both, peak(one.both, device.type == "cuda") / 2**30, decode(layer, T, x.detach()[:, :1]))


def draw(found: dict[str, list[Point]], sizes: Sizes, out: Path) -> None:
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    for axis, what, label in zip(axes, ("both", "memory"), ("ms", "GiB"), strict=True):
        for kind, points in found.items():
            axis.plot([p.T for p in points], [getattr(p, what) for p in points], marker="o", markersize=3, label=kind)
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", xlabel="tokens of the row", ylabel=label)
        lengths = sorted({p.T for points in found.values() for p in points})
        axis.set_xticks(lengths, labels=[f"{T // 1024}k" if T >= 1024 else str(T) for T in lengths])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(f"a layer of width {sizes.width}, bf16: forward and backward, memory above weights and input")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=[*TOKEN], choices=TOKEN)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048 << i for i in range(8)])
    parser.add_argument("--seconds", type=float, default=540, help="nothing is begun after that")
    parser.add_argument("--small", action="store_true", help="a toy, to try this script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("lengths.png"))
    args = parser.parse_args()
    began, device, sizes, lengths = time.monotonic(), torch.device(args.device), BIG, args.lengths
    if args.small:
        sizes, lengths = SMALL, [32, 64]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, width {sizes.width}, {sizes.heads} heads of {sizes.head}, bf16\n")
    print("| tokens | layer | forward + backward ms | us a token | GiB | decode step us | s |\n|" + "---|" * 7)
    found: dict[str, list[Point]] = {kind: [] for kind in args.layers}
    full: set[str] = set()
    for T, kind in ((T, kind) for T in lengths for kind in args.layers):
        at = time.monotonic()
        if at - began > args.seconds:
            print(f"| {T} | {kind} and all after it: no time left | | | | | |")
            break
        if kind in full:
            continue
        try:
            p = measure(kind, T, sizes, device)
        except torch.OutOfMemoryError:
            full.add(kind)
            print(f"| {T} | {kind} | out of memory | | | | {time.monotonic() - at:.0f} |", flush=True)
            continue
        finally:
            gc.collect()                     # compiled layers hold one another
            if device.type == "cuda":
                torch.cuda.empty_cache()
        found[kind].append(p)
        print(f"| {T} | {kind} | {p.both:.2f} | {p.both * 1e3 / T:.3f} | {p.memory:.2f} | {p.step * 1e3:.1f} | "
              f"{time.monotonic() - at:.0f} |", flush=True)
        draw(found, sizes, args.out)


if __name__ == "__main__":
    main()
