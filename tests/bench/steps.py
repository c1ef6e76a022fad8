"""One GPU: a decode step of each recurrence, beside its floor and flash-linear-attention's in the same run.

    python tests/bench/steps.py [--peer]

Steps of as many layers as have 256 MiB of state between them are recorded and played back, so that no state is still
in the L2 cache when its turn comes; the time is that of a step, the floor what reading and writing its state takes at
3.0 TB/s.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.ops import step

BANDWIDTH, FILL = 3.0e12, 256 << 20
KINDS = (("gla", 16, 16, 128, 128), ("gated delta", 16, 16, 128, 128), ("gated delta", 32, 16, 128, 128),
         ("ssd", 64, 1, 128, 64))           # H, G, K, V


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def matrices(kind: str, B: int, H: int, G: int, K: int, V: int, peer: bool) -> tuple[int, Callable[..., Any], Any]:
    """Bytes of a state, our step of one, and the peer's."""
    q, k, v = randn(B, 1, G, K), F.normalize(randn(B, 1, G, K), dim=-1), randn(B, 1, H, V)
    g = F.logsigmoid(randn(B, 1, H, K, dtype=torch.float32)) / 16
    beta = randn(B, 1, H, dtype=torch.float32).sigmoid() if kind == "gated delta" else None
    g, start, theirs = g if kind == "gla" else g[..., 0].contiguous(), torch.zeros(B, 1, device="cuda").bool(), None
    if peer:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
        from fla.ops.gla import fused_recurrent_gla
        from fla.ops.simple_gla import fused_recurrent_simple_gla
        wide = [z.repeat_interleave(H // G, 2) for z in (q, k)]     # only its delta rule shares them among heads
        call = {"gla": partial(fused_recurrent_gla, q, k, v, gk=g),
                "ssd": partial(fused_recurrent_simple_gla, *wide, v, g=g),
                "gated delta": partial(fused_recurrent_gated_delta_rule, q, k, v, g=g, beta=beta)}[kind]
        theirs = lambda S: call(scale=K**-0.5, initial_state=S.view(B, H, K, V), output_final_state=True)
    return 4 * B * H * K * V, lambda S: step.matrix(q, k, v, g, beta, start, S.view(B, H, K, V), K**-0.5), theirs


def scan(B: int, D: int, N: int) -> tuple[int, Callable[..., Any], None]:
    q, k, v = randn(B, 1, N), randn(B, 1, N), randn(B, 1, D)
    dt, A = randn(B, 1, D, dtype=torch.float32).exp(), -randn(D, N, dtype=torch.float32).exp()
    start = torch.zeros(B, 1, device="cuda").bool()
    return 4 * B * D * N, lambda h: step.scan(q, k, v, dt, A, start, h.view(B, D, N)), None


def microseconds(f: Callable[[Tensor], Any], states: Tensor) -> float:
    """Of f on one of the states."""
    f(states[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for state in states:
            f(state)
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(states))
    return median(times[3:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="flash-linear-attention beside it; it must be installed")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}\n")
    print("| | batch | ours us | peer us | floor us |\n|" + "---|" * 5)
    for B in (1, 64):
        for kind, H, G, K, V in KINDS:
            report(f"{kind}, {H} heads of {K} x {V}", B, *matrices(kind, B, H, G, K, V, args.peer))
        report("scan, 4096 channels of 16", B, *scan(B, 4096, 16))


def report(name: str, B: int, size: int, ours: Callable[..., Any], theirs: Callable[..., Any] | None) -> None:
    states = torch.zeros(max(FILL // size, 1), size // 4, device="cuda")
    took = [f"{microseconds(f, states):.1f}" if f else "" for f in (ours, theirs)]
    print(f"| {name} | {B} | {took[0]} | {took[1]} | {2e6 * size / BANDWIDTH:.1f} |", flush=True)


if __name__ == "__main__":
    main()
