"""One GPU: the 1.11B dense Llama shape, ours beside Hugging Face's compiled Llama, in one run. `make bench`.

"packed" is ours on rows of several documents, some 512 tokens long, as a run has them: attention stays inside each.
Its MFU counts attention over whole rows all the same.
Each side has a process of its own with an empty compiler cache, so that the time to the first step is honest: it runs
from the start of building the model to the end of the first optimizer step.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

ROWS, LENGTH, VOCAB, WIDTH, LAYERS, HIDDEN, HEADS, KV = 8, 2048, 32768, 2048, 16, 8192, 32, 8
DOCUMENT, PEAK = 512, 989e12


def ours(steps: int, profile: str, packed: bool = False) -> dict[str, Any]:
    from stepladder.model.config import BlockConfig, ModelConfig
    from stepladder.model.context import borders
    from stepladder.model.decoder import flops, parameters
    from stepladder.model.registry import CHANNEL, TOKEN, find
    from stepladder.parallel.build import build
    from stepladder.parallel.mesh import Mesh
    from stepladder.parallel.optimizer import Optimizer
    from stepladder.parallel.pipeline import Micro
    from stepladder.parallel.support import Parallel

    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    block = BlockConfig(find(TOKEN, "attention").Spec(heads=HEADS, kv_heads=KV, head_dim=WIDTH // HEADS),
                        find(CHANNEL, "swiglu").Spec(hidden=HIDDEN))
    cfg = ModelConfig(vocab=VOCAB, width=WIDTH, layers=LAYERS, blocks={"a": block}, pattern=("a",))
    parts = build(cfg, Mesh(Parallel(), torch.device("cuda")), seed=0, dtype=torch.bfloat16, compiled=True)
    optimizer = Optimizer(parts)
    built = time.perf_counter() - began

    start = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(0)) < 1 / DOCUMENT
    begins = (start.cuda(), borders(start).cuda()) if packed else (None, None)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        result = parts.pipe([Micro(tokens[:, :-1], tokens[:, 1:], *begins)])
        parts.sums()
        return optimizer.step(result, 3e-4).nll

    out = measure(step, steps, began, profile)
    return {"parameters": parameters(cfg)[0], "built_s": built, "flops": 3 * flops(cfg, LENGTH), **out}


def huggingface(steps: int, profile: str) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    began = time.perf_counter()
    cfg = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, intermediate_size=HIDDEN,
                      num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=LENGTH,
                      attn_implementation="sdpa", use_cache=False)
    with torch.device("cuda"):
        model = LlamaForCausalLM(cfg).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model = torch.compile(model)
    built = time.perf_counter() - began

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    out = measure(step, steps, began, profile)
    return {"parameters": sum(p.numel() for p in model.parameters()), "built_s": built, "flops": 0, **out}


def measure(step: Any, steps: int, began: float, profile: str) -> dict[str, Any]:
    gen = torch.Generator(device="cuda").manual_seed(0)
    batch = lambda: torch.randint(VOCAB, (ROWS, LENGTH + 1), device="cuda", generator=gen)
    loss = float(step(batch()))
    first = time.perf_counter() - began
    for _ in range(4):
        step(batch())
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        loss = step(batch())
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    if profile:
        with torch.profiler.profile() as p:
            step(batch())
            torch.cuda.synchronize()
        with open(profile, "w") as f:
            f.write(p.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90))
    return {"first_step_s": first, "median_ms": times[len(times) // 2], "min_ms": times[0], "max_ms": times[-1],
            "loss": float(loss), "memory_gib": torch.cuda.max_memory_allocated() / 2**30}


SIDES: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "huggingface": huggingface, "ours": ours, "packed": partial(ours, packed=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", default="", help="write a table of kernels to FILE.SIDE")
    parser.add_argument("--only", choices=SIDES)
    args = parser.parse_args()
    if args.side:
        profile = f"{args.profile}.{args.side}" if args.profile else ""
        print(json.dumps(SIDES[args.side](args.steps, profile)))
        return
    results = {}
    for side in (args.only,) if args.only else SIDES:
        with tempfile.TemporaryDirectory() as cache:
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
            out = subprocess.run([sys.executable, __file__, "--side", side, "--steps", str(args.steps),
                                  "--profile", args.profile], env=env, stdout=subprocess.PIPE, check=True, text=True)
        results[side] = json.loads(out.stdout.splitlines()[-1])
    name, per_token = torch.cuda.get_device_name(), max(r["flops"] for r in results.values())
    print(f"{name}, torch {torch.__version__}, {ROWS} x {LENGTH} tokens, median of {args.steps} steps")
    print("| side | tokens/s | MFU | step ms (min-max) | memory GiB | build s | first step s |")
    print("|---|---|---|---|---|---|---|")
    for side, r in results.items():
        speed = ROWS * LENGTH / r["median_ms"] * 1e3
        print(f"| {side} ({r['parameters'] / 1e9:.2f}B) | {speed:,.0f} | {speed * per_token / PEAK:.1%} | "
              f"{r['median_ms']:.1f} ({r['min_ms']:.1f}-{r['max_ms']:.1f}) | {r['memory_gib']:.1f} | "
              f"{r['built_s']:.1f} | {r['first_step_s']:.1f} |")
    if {"huggingface", "ours"} <= results.keys():
        print(f"ratio {results['huggingface']['median_ms'] / results['ours']['median_ms']:.3f}")


if __name__ == "__main__":
    main()
