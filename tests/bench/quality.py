"""What a wiring or a mixer costs in quality: sides on the same tokens, several seeds, a GPU each.

    python tests/bench/quality.py SHARDS [--steps 2000] [--seeds 3] [--sides standard ladder] [--out quality.png]
    python tests/bench/quality.py SHARDS --sides attention gla gated_delta hybrid

Twelve layers of width 768, hidden 2048. The sides named after a wiring have 12 heads of attention, 4 of keys (125 M
parameters with 32k words); those named after a mixer have 4 width^2 weights in it, or a little more, and hybrid has
three layers of gated_delta to one of attention. A seed fixes initial values and data order, so sides differ in what
they are named after alone; the gap between them is to be read beside the spread of the seeds.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import mean, median, stdev

import torch

ATTENTION = '{{ kind = "attention", heads = {heads}, kv_heads = {kv}, qk_norm = true }}'
FULL = '{{ kind = "attention", heads = {heads}, kv_heads = {heads}, qk_norm = true }}'
GLA = '{{ kind = "gla", heads = {few}, key_dim = {half}, value_dim = {head} }}'
DELTA = '{{ kind = "gated_delta", heads = {few}, key_dim = {half}, value_dim = {head} }}'
SIDES = {                # token mixers, one after the other, and their wiring
    "standard": ([ATTENTION], [0, 0]), "parallel": ([ATTENTION], [0, 1]), "ladder": ([ATTENTION], [1, 1]),
    "attention": ([FULL], [0, 0]), "gla": ([GLA], [0, 0]), "gated_delta": ([DELTA], [0, 0]),
    "hybrid": ([DELTA, DELTA, DELTA, FULL], [0, 0]),
}
RUN = """
[model]
vocab = {vocab}
width = {width}
layers = {layers}
pattern = {pattern}

{blocks}
[data]
seq = {seq}
rows = {rows}
batch_tokens = {batch}
lanes = {lanes}
heldout = 0.02
workers = {workers}
sources.all.shards = "{shards}"

[train]
steps = {steps}
seed = {seed}
dtype = "{dtype}"
compile = {gpu}
graph = {gpu}
eval_every = {every}
eval_batches = {batches}

[optimizer]
lr = 1e-3
warmup_steps = {warmup}

[checkpoint]
every = 0
"""
BLOCK = """
[model.blocks.{name}]
token = {token}
channel = {{ kind = "swiglu", hidden = {hidden} }}
lag = {lag}
"""
BIG = {"width": 768, "layers": 12, "heads": 12, "kv": 4, "few": 6, "half": 64, "head": 128, "hidden": 2048, "seq": 1024,
       "rows": 32, "batch": 65536, "workers": 2, "dtype": "bf16", "gpu": "true", "batches": 16, "lanes": 64}
SMALL = {"width": 32, "layers": 4, "heads": 4, "kv": 2, "few": 2, "half": 8, "head": 16, "hidden": 64, "seq": 64,
         "rows": 8, "batch": 512, "workers": 0, "dtype": "fp32", "gpu": "false", "batches": 1,
         "lanes": 8}


def train(side: str, seed: int, args: argparse.Namespace, folder: Path, free: Queue[str]) -> list[dict[str, float]]:
    """The log of one run, on a device that is free."""
    vocab = json.loads((args.shards / "manifest.json").read_text())["tokenizer"]["vocab"]
    size, (mixers, lag) = SMALL if args.small else BIG, SIDES[side]
    names = {mixer: f"b{i}" for i, mixer in enumerate(dict.fromkeys(mixers))}
    blocks = [BLOCK.format(name=name, token=mixer.format(**size), lag=lag, **size) for mixer, name in names.items()]
    text = RUN.format(pattern=[names[mixer] for mixer in mixers], blocks="".join(blocks), seed=seed, steps=args.steps,
                      shards=args.shards.resolve(), vocab=-(-vocab // 64) * 64, every=max(1, args.steps // 8),
                      warmup=args.steps // 10, **size)
    out = folder / f"{side}-{seed}"
    toml = out.with_suffix(".toml")
    toml.write_text(text)
    command = [sys.executable, "-m", "stepladder.launch.cli", "train", str(toml), "--folder", str(out)]
    device = free.get()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": device})
    free.put(device)
    if done.returncode:
        raise RuntimeError(f"{side}, seed {seed}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    print(f"{side:11} seed {seed}: held-out {log[-1]['eval_loss']:.4f} after {log[-1]['tokens'] / 1e6:.1f} M tokens, "
          f"{median(r['tokens_per_s'] for r in log):,.0f} tokens/s", flush=True)
    return log


def draw(logs: dict[tuple[str, int], list[dict[str, float]]], out: Path) -> None:
    from matplotlib import pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 5))
    for (side, _), log in logs.items():
        points = [(r["tokens"] / 1e6, r["eval_loss"]) for r in log if "eval_loss" in r]
        color = f"C{list(SIDES).index(side)}"
        axis.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=0.8, label=side)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(*zip(*{label: (h, label) for h, label in zip(handles, labels, strict=True)}.values(), strict=True))
    axis.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=["standard", "ladder"], choices=SIDES)
    parser.add_argument("--small", action="store_true", help="a toy, to try this script")
    parser.add_argument("--out", type=Path, default=Path("quality.png"))
    args = parser.parse_args()
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    free: Queue[str] = Queue()
    for device in devices:
        free.put(device)
    # Seed by seed and side by side: whatever drifts, drifts for all of them.
    jobs = [(side, seed) for seed in range(args.seeds) for side in args.sides]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(devices)) as pool:
        logs = dict(zip(jobs, pool.map(lambda job: train(job[0], job[1], args, Path(folder), free), jobs), strict=True))
    final = {side: [logs[side, seed][-1]["eval_loss"] for seed in range(args.seeds)] for side in args.sides}
    for side, losses in final.items():
        spread = stdev(losses) if len(losses) > 1 else float("nan")
        print(f"{side:11} {mean(losses):.4f} +- {spread:.4f} ({', '.join(f'{x:.4f}' for x in losses)})")
    first = args.sides[0]
    for side in args.sides[1:]:
        gaps = [b - a for a, b in zip(final[first], final[side], strict=True)]
        print(f"{side} - {first}, seed by seed: {', '.join(f'{g:+.4f}' for g in gaps)}; mean {mean(gaps):+.4f}")
    draw(logs, args.out)


if __name__ == "__main__":
    main()
