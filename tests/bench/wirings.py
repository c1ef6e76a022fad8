"""What ladder costs in quality: standard, parallel and ladder wiring on the same tokens, several seeds, one GPU.

    python tests/bench/wirings.py SHARDS [--steps 2000] [--seeds 3] [--sides standard ladder] [--out wirings.png]

125 M parameters (12 layers of width 768, 12 heads, 4 of keys, hidden 2048, 32k words). A seed fixes initial values and
data order, so sides differ in the wiring alone; the gap between them is to be read beside the spread of the seeds.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

LAGS = {"standard": [0, 0], "parallel": [0, 1], "ladder": [1, 1]}
RUN = """
[model]
vocab = {vocab}
width = {width}
layers = {layers}
pattern = ["a"]

[model.blocks.a]
token = {{ kind = "attention", heads = {heads}, kv_heads = {kv} }}
channel = {{ kind = "swiglu", hidden = {hidden} }}
lag = {lag}

[data]
seq = {seq}
rows = {rows}
batch_tokens = {batch}
lanes = 8
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
BIG = {"width": 768, "layers": 12, "heads": 12, "kv": 4, "hidden": 2048, "seq": 1024, "rows": 32, "batch": 65536,
       "workers": 2, "dtype": "bf16", "gpu": "true", "batches": 16}
SMALL = {"width": 32, "layers": 2, "heads": 4, "kv": 2, "hidden": 64, "seq": 64, "rows": 8, "batch": 512, "workers": 0,
         "dtype": "fp32", "gpu": "false", "batches": 1}


def train(side: str, seed: int, args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The log of one run."""
    vocab = json.loads((args.shards / "manifest.json").read_text())["tokenizer"]["vocab"]
    text = RUN.format(lag=LAGS[side], seed=seed, shards=args.shards.resolve(), steps=args.steps,
                      vocab=-(-vocab // 64) * 64,
                      every=max(1, args.steps // 8), warmup=args.steps // 20, **(SMALL if args.small else BIG))
    (folder / "run.toml").write_text(text)
    out = folder / f"{side}-{seed}"
    command = [sys.executable, "-m", "stepladder.launch.cli", "train", str(folder / "run.toml"), "--folder", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}, seed {seed}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def draw(logs: dict[tuple[str, int], list[dict[str, float]]], out: Path) -> None:
    from matplotlib import pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 5))
    for (side, _), log in logs.items():
        points = [(r["tokens"] / 1e6, r["eval_loss"]) for r in log if "eval_loss" in r]
        axis.plot(*zip(*points, strict=True), color=f"C{list(LAGS).index(side)}", marker=".", linewidth=0.8, label=side)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(*zip(*{label: (h, label) for h, label in zip(handles, labels, strict=True)}.values(), strict=True))
    axis.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=["standard", "ladder"], choices=LAGS)
    parser.add_argument("--small", action="store_true", help="a toy, to try this script")
    parser.add_argument("--out", type=Path, default=Path("wirings.png"))
    args = parser.parse_args()
    logs = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):                     # alternating: whatever drifts, drifts for all sides
            for side in args.sides:
                logs[side, seed] = train(side, seed, args, Path(folder))
                last = logs[side, seed][-1]
                print(f"{side:9} seed {seed}: held-out {last['eval_loss']:.4f} after {last['tokens'] / 1e6:.1f} M "
                      f"tokens, {last['tokens_per_s']:,.0f} tokens/s", flush=True)
    final = {side: [logs[side, seed][-1]["eval_loss"] for seed in range(args.seeds)] for side in args.sides}
    for side, losses in final.items():
        spread = stdev(losses) if len(losses) > 1 else float("nan")
        print(f"{side:9} {mean(losses):.4f} +- {spread:.4f} ({', '.join(f'{x:.4f}' for x in losses)})")
    first = args.sides[0]
    for side in args.sides[1:]:
        gaps = [b - a for a, b in zip(final[first], final[side], strict=True)]
        print(f"{side} - {first}, seed by seed: {', '.join(f'{g:+.4f}' for g in gaps)}; mean {mean(gaps):+.4f}")
    draw(logs, args.out)


if __name__ == "__main__":
    main()
