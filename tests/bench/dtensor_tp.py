"""The peer of tests/bench/ladder.py: the same stack in plain torch, split by torch's DTensor tensor parallelism with
sequence parallelism, compiled, with and without async-TP.

    torchrun --nproc-per-node 4 tests/bench/dtensor_tp.py [--async-tp]
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import pairwise
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, D: int, H: int, G: int):
        super().__init__()
        self.K = D // H
        self.wq, self.wo = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.wk, self.wv = nn.Linear(D, G * self.K, bias=False), nn.Linear(D, G * self.K, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.K)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (z.chunk(2, -1) for z in (q, k)))
        y = F.scaled_dot_product_attention(q.bfloat16() if x.is_cuda else q, k.bfloat16() if x.is_cuda else k, v,
                                           is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, D: int, hidden: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((D, hidden), (D, hidden), (hidden, D)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, D: int, H: int, G: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.token, self.channel = Attention(D, H, G), Feed(D, hidden)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.token(self.norm1(h), cos, sin)
        return h + self.channel(self.norm2(h))


PLAN = {
    "norm1": SequenceParallel(), "norm2": SequenceParallel(),
    "token": PrepareModuleInput(input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)),
    "token.wq": ColwiseParallel(), "token.wk": ColwiseParallel(), "token.wv": ColwiseParallel(),
    "token.wo": RowwiseParallel(output_layouts=Shard(1)),
    "channel": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "channel.gate": ColwiseParallel(), "channel.up": ColwiseParallel(),
    "channel.down": RowwiseParallel(output_layouts=Shard(1)),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--async-tp", action="store_true")
    parser.add_argument("--host", action="store_true", help="no graphs")
    args = parser.parse_args()
    size, gpu = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    mesh = init_device_mesh(device.type, (size,))
    if args.async_tp:
        import torch._inductor.config as inductor
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group
        inductor._micro_pipeline_tp = True
        enable_symm_mem_for_group(mesh.get_group().group_name)
    D, H, G, hidden = (4096, 32, 8, 14336) if gpu else (128, 8, 4, 256)
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    with device:
        layers = nn.ModuleList(Block(D, H, G, hidden) for _ in range(args.layers)).to(dtype)
    for layer in layers:
        parallelize_module(layer, mesh, PLAN)
        layer.compile(fullgraph=True)
    n, K = args.tokens, D // H
    angle = torch.arange(n, device=device)[:, None] * 1e4 ** (-torch.arange(0, K, 2, device=device) / K)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = torch.randn(1, n // size, D, device=device, dtype=dtype)
    grad = torch.randn_like(x)
    kept: list[Tensor] = []

    def forward() -> None:
        h = x
        for layer in layers:
            h = layer(h, cos, sin)
            h = h.to_local() if hasattr(h, "to_local") else h
        kept[:] = [h]

    def backward() -> None:
        kept[0].backward(grad)

    parts, how = [forward, backward], "host"
    stream = torch.cuda.Stream() if gpu else None
    with torch.cuda.stream(stream):
        for _ in range(3):
            layers.zero_grad()
            forward()
            backward()
    if gpu and not args.host:
        torch.cuda.synchronize()
        dist.barrier()
        layers.zero_grad()
        pool, graphs = torch.cuda.graph_pool_handle(), []
        for part in (forward, backward):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool, stream=stream, capture_error_mode="thread_local"):
                part()
        parts, how = [g.replay for g in graphs], "graph"
    took = []
    for i in range(30):
        marks = []
        for part in [None, *parts]:
            if part is not None:
                part()
            marks.append(torch.cuda.Event(enable_timing=True) if gpu else time.perf_counter())
            if gpu:
                marks[-1].record()
        if gpu:
            torch.cuda.synchronize()
        if i > 5:
            took.append([a.elapsed_time(b) if gpu else 1e3 * (b - a) for a, b in pairwise(marks)])
        if how == "host":
            layers.zero_grad()
    if dist.get_rank() == 0:
        f, b = (median(t) for t in zip(*took, strict=True))
        name = "async-TP" if args.async_tp else "DTensor TP+SP"
        print(f"TP{size} {n} tokens, {args.layers} layers, torch {name} ({how}): forward {f:.2f} backward {b:.2f} "
              f"both {f + b:.2f} ms")
        print(json.dumps({"peer": name, "tp": size, "tokens": n, "how": how, "ms": [f, b]}), flush=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
