"""Multi-query associative recall (arXiv:2312.04927) against the size of the state, for every token mixer.

    python tests/bench/recall.py [--steps 3000] [--seeds 3] [--mixers attention gla gated_delta ...] [--jobs 4]
                                 [--out recall.png]

A row lists PAIRS of keys and values, then asks for the values of all keys in random order, with the answers in between.
Two layers; only answers are learned from. A mixer's state grows with its heads' keys and values, attention's with the
row, so accuracy stands over floats of state a layer at the row's end. Who only learns which values are left to be
asked for has H_n / n of n answers right, 0.21 of 16: none has more for the first hundreds of steps.

Attention's weights begin at width^-1/2, its heads are normed and its RoPE base goes with short rows: at 0.02, unnormed
and with a base of 10,000 it found no answer to 8 pairs in 1,500 steps, so in 300.
"""
from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.context import Context
from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.ops.loss import IGNORE
from stepladder.parallel.build import Parts, build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.optimizer import Optimizer
from stepladder.parallel.pipeline import Micro
from stepladder.parallel.support import Parallel

WIDTH, HEADS, ROWS = 128, 2, 256
SIDES = {                # of one head: keys and values of these sizes
    "attention": lambda d: {"heads": HEADS, "head_dim": WIDTH // HEADS, "theta": 100.0, "qk_norm": True},
    "gla": lambda d: {"heads": HEADS, "key_dim": d, "value_dim": d},
    "gated_delta": lambda d: {"heads": HEADS, "key_dim": d, "value_dim": d},
    "deltanet": lambda d: {"heads": HEADS, "key_dim": d, "value_dim": d},
    "retention": lambda d: {"heads": HEADS, "key_dim": d, "value_dim": d},
    "mamba2": lambda d: {"heads": HEADS, "key_dim": d, "value_dim": d},
    "mamba": lambda d: {"inner": 2 * WIDTH, "state": max(1, d * d * HEADS // (2 * WIDTH))},
}


def rows(n: int, pairs: int, gen: torch.Generator, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and targets (n, 4 pairs); keys are 1 to 4 pairs, values those after them, 0 stands for nothing."""
    pick = lambda: torch.rand(n, 4 * pairs, generator=gen, device=device).argsort(1)[:, :pairs] + 1
    keys, values = pick(), pick() + 4 * pairs
    order = torch.rand(n, pairs, generator=gen, device=device).argsort(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    tokens = torch.cat([torch.stack([keys, values], -1).flatten(1), asked], 1)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2 * pairs::2] = asked[:, 1::2]
    return tokens, targets


def model(mixer: str, size: int, pairs: int, seed: int, device: torch.device) -> Parts:
    spec = find(TOKEN, mixer).Spec(**SIDES[mixer](size))
    block = BlockConfig(spec, find(CHANNEL, "swiglu").Spec(hidden=2 * WIDTH))
    cfg = ModelConfig(vocab=-(-(8 * pairs + 1) // 64) * 64, width=WIDTH, layers=2, blocks={"a": block}, pattern=("a",),
                      std=WIDTH**-0.5 if mixer == "attention" else 0.02)
    return build(cfg, Mesh(Parallel(), device), seed=seed, captured=device.type == "cuda")


def floats(parts: Parts, length: int) -> int:
    """State of a layer and row."""
    return sum(t.numel() for t in parts.decoder.begin(1, length)["0"]
               if t.is_floating_point())


@torch.no_grad()
def accuracy(parts: Parts, pairs: int, device: str) -> float:
    gen = torch.Generator(device).manual_seed(1 << 20)
    tokens, targets = rows(ROWS, pairs, gen, device)
    stream = parts.decoder(tokens, Context.plain(*tokens.shape, device=device))
    (logits,) = parts.decoder.finish(stream)
    asked = targets != IGNORE
    return float((logits.argmax(-1) == targets)[asked].float().mean())


def train(mixer: str, size: int, seed: int, args: argparse.Namespace) -> tuple[int, float, float]:
    """Floats of state, the share of answers that are right, and seconds."""
    began = time.perf_counter()
    torch.set_num_threads(1)                 # there are others beside this one
    torch.set_float32_matmul_precision("high")
    parts = model(mixer, size, args.pairs, seed, torch.device(args.device))
    optimizer = Optimizer(parts)
    gen = torch.Generator(args.device).manual_seed(seed)
    for step in range(args.steps):
        tokens, targets = rows(ROWS, args.pairs, gen, args.device)
        result = parts.pipe([Micro(tokens, targets, None)])
        parts.sums()
        lr = args.lr * min(1.0, 20 * (step + 1) / args.steps) * (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.step(result, lr)
    right = accuracy(parts, args.pairs, args.device)
    return floats(parts, tokens.shape[1]), right, time.perf_counter() - began


def draw(found: dict[str, list[tuple[int, list[float]]]], args: argparse.Namespace) -> None:
    from matplotlib import pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 5))
    for mixer, points in found.items():
        sizes, means = [s for s, _ in points], [sum(a) / len(a) for _, a in points]
        low, high = [m - min(a) for m, (_, a) in zip(means, points, strict=True)], \
                    [max(a) - m for m, (_, a) in zip(means, points, strict=True)]
        axis.errorbar(sizes, means, (low, high), marker="o", capsize=3, label=mixer)
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="floats of state, a layer", ylabel="answers right",
             title=f"{args.pairs} pairs, {4 * args.pairs} tokens, {args.steps} steps of {ROWS} rows")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    figure.savefig(args.out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixers", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--jobs", type=int, default=4, help="models trained at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("recall.png"))
    args = parser.parse_args()
    print(f"{args.pairs} pairs, {args.steps} steps of {ROWS} rows, lr {args.lr}\n")
    print("| mixer | floats of state | answers right, each seed | s |\n|---|---|---|---|")
    found: dict[str, list[Any]] = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        models = [(mixer, size) for mixer in args.mixers
                  for size in (args.sizes[-1:] if mixer == "attention" else args.sizes)]
        jobs = {m: [pool.submit(train, *m, seed, args) for seed in range(args.seeds)] for m in models}
        for (mixer, _), futures in jobs.items():
            state, right, took = zip(*(f.result() for f in futures), strict=True)
            found.setdefault(mixer, []).append((state[0], list(right)))
            print(f"| {mixer} | {state[0]:,} | {', '.join(f'{r:.3f}' for r in right)} | {sum(took):.0f} |", flush=True)
            draw(found, args)


if __name__ == "__main__":
    main()
