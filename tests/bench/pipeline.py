"""Pipeline schedules on as many ranks as there are processes: step time and bubble, measured and by formula.

    torchrun --nproc-per-node 4 tests/bench/pipeline.py            # or 2; --draw FOLDER, --cpu for a dry run

A dense model with stages of equal work (the vocabulary is small), in bf16 and eager, 4 micro-batches a rank. The bubble
is that of one step after the timed ones; "free" is what the same pieces of work cost if sending took no time, "alike"
the same with pieces of a kind that take equally long on every stage. The formula of zero-bubble wants F = I = W.
"""
from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

from stepladder.launch import timeline
from stepladder.launch.world import find
from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.registry import CHANNEL, TOKEN
from stepladder.model.registry import find as mixer
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.pipeline import Micro
from stepladder.parallel.support import Parallel

LAYOUTS = [("1f1b", 2), ("interleaved", 2), ("interleaved", 4), ("zero-bubble", 2)]      # schedule, chunks
LAYERS = 8                                                                               # a rank


def model(ranks: int, width: int, hidden: int) -> ModelConfig:
    block = BlockConfig(mixer(TOKEN, "attention").Spec(heads=width // 64, kv_heads=width // 256, head_dim=64),
                        mixer(CHANNEL, "swiglu").Spec(hidden=hidden))
    return ModelConfig(vocab=512, width=width, layers=LAYERS * ranks, blocks={"a": block}, pattern=("a",))


def measure(cfg: ModelConfig, layout: Parallel, batch: list[Micro], args: argparse.Namespace) -> list[str]:
    """Cells of a row of the table."""
    rank, cpu = dist.get_rank(), args.cpu
    mesh = Mesh(layout, batch[0].tokens.device, rank, dist.get_world_size())
    dtype = torch.float32 if cpu else torch.bfloat16
    parts = build(cfg, mesh, seed=0, dtype=dtype, seq=args.tokens)
    times = []
    for at in range(args.steps + 3):
        recorder = parts.pipe.clock = timeline.Recorder(mesh) if at == args.steps + 2 else None
        dist.barrier()
        began = time.perf_counter()
        parts.pipe(batch)
        if not cpu:
            torch.cuda.synchronize()
        dist.barrier()
        if at > 1 and recorder is None:                     # the first two make connections and buffers
            times.append(time.perf_counter() - began)
        for p in parts.parameters().values():
            p.grad = None
    boxes = recorder.boxes() if recorder is not None else []
    memory = torch.zeros(1, device=mesh.device) if cpu else torch.tensor([torch.cuda.max_memory_allocated() / 2**30],
                                                                         device=mesh.device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    if args.draw and rank == 0:
        timeline.draw(boxes, Path(args.draw) / f"{layout.schedule}-{layout.chunks}-pp{layout.pp}.png", layout)
    step = statistics.median(times)
    took = defaultdict(list)
    for b in boxes:
        took[b.kind, b.stage].append(1e3 * (b.end - b.start))
    mean = {k: [statistics.mean(took[of]) for of in sorted(took) if of[0] == k] for k, _ in took}
    spans = layout.stages // layout.pp
    measured, formula = timeline.share(boxes), timeline.bubble(layout, len(batch))
    return [layout.schedule, str(spans), f"{step * 1e3:.1f} ({min(times) * 1e3:.1f}-{max(times) * 1e3:.1f})",
            f"{len(batch) * batch[0].tokens.numel() / step:,.0f}", f"{measured:.1%}",
            *(f"{timeline.share(timeline.replay(boxes, alike=alike)):.1%}" for alike in (False, True)),
            f"{formula:.1%}", f"{measured / formula:.2f}",
            ", ".join(f"{k} {' '.join(f'{x:.2f}' for x in v)}" for k, v in mean.items()), f"{float(memory):.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo and a tiny model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="a row; a micro-batch is two rows")
    names = [*dict.fromkeys(name for name, _ in LAYOUTS)]
    parser.add_argument("--schedules", nargs="+", default=names, choices=names)
    parser.add_argument("--draw", help="folder for a timeline of each schedule")
    args = parser.parse_args()
    args.tokens = args.tokens or (32 if args.cpu else 4096)
    world = find()
    device = torch.device("cpu") if args.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not args.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.cpu else "nccl", device_id=None if args.cpu else device)
    cfg = model(world.size, *((256, 256) if args.cpu else (2048, 8192)))
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.vocab, (4 * world.size, 2, args.tokens + 1), generator=gen).to(device)
    batch = [Micro(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None) for t in tokens]
    rows = []
    for schedule, chunks in (layout for layout in LAYOUTS if layout[0] in args.schedules):
        layout = Parallel(pp=world.size, schedule=schedule, chunks=chunks)  # pyright: ignore[reportArgumentType]
        if not args.cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rows.append(measure(cfg, layout, batch, args))
        if world.main:
            print(" | ".join(rows[-1]), flush=True)
    dist.destroy_process_group()
    if world.main:
        name = "cpu" if args.cpu else torch.cuda.get_device_name()
        print(f"{world.size} x {name}, torch {torch.__version__}: {cfg.layers} layers of width {cfg.width}, "
              f"{len(batch)} micro-batches of 2 x {args.tokens} tokens, median of {args.steps} steps, no optimizer")
        print("| schedule | spans a rank | step ms (min-max) | tokens/s | bubble | free | alike | formula | "
              "bubble/formula | mean ms of a piece, by stage | GiB |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
