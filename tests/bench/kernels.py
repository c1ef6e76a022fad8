"""One GPU: forward and forward + backward of a kernel family, its floor, and flash-linear-attention's in the same run.

    python tests/bench/kernels.py gla [--tokens 32768] [--peer] [--configs]

Time is the median over calls that take turns, between CUDA events; memory the peak above the inputs; the floor what
compulsory bytes take at 3.0 TB/s or products at 800 TFLOP/s, whichever is more; the first call compiles unless cached.
--configs measures every configuration of the family's tables too.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from timing import milliseconds, peak
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

BANDWIDTH, RATE, HEADS = 3.0e12, 800e12, 16
SHAPES = ((2048, 128, 128), (8192, 128, 128), (32768, 128, 128), (2048, 64, 64), (2048, 128, 256))     # T, K, V


class Case(NamedTuple):
    inputs: dict[str, Tensor]
    ours: Callable[..., tuple[Tensor, ...]]
    peer: Callable[..., tuple[Tensor, ...]] | None
    bytes: tuple[float, float]                 # forward, backward
    flops: tuple[float, float]
    tables: dict[str, tuple[dict[Any, Any], Any]]      # where configurations lie, of which the first runs


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def gla(B: int, T: int, K: int, V: int, peer: bool) -> Case:
    from stepladder.kernels import gla_backward, gla_states
    from stepladder.ops import gla as ops
    start = torch.zeros(B, T, dtype=torch.bool, device="cuda")
    inputs = {"q": randn(B, T, HEADS, K), "k": randn(B, T, HEADS, K), "v": randn(B, T, HEADS, V),
              "g": F.logsigmoid(randn(B, T, HEADS, K, dtype=torch.float32)) / 16,
              "S": randn(B, HEADS, K, V, dtype=torch.float32)}
    theirs = None
    if peer:
        from fla.ops.gla import chunk_gla
        theirs = lambda q, k, v, g, S: chunk_gla(q, k, v, g, scale=K**-0.5, initial_state=S, output_final_state=True)
    n, states = B * T * HEADS, 2 * K * V / 64          # bytes of a state per token, every 64 in bf16
    return Case(inputs, lambda q, k, v, g, S: ops.fused(q, k, v, g, start, S, K**-0.5), theirs,
                (n * (8 * K + 4 * V + states), n * (16 * K + 6 * V + states)),
                (n * (4 * K * V + 128 * (K + V)), n * (10 * K * V + 64 * (6 * K + 4 * V))),
                {name: (vars(module), name) for module, name in
                 ((gla_states, "FACTORS"), (gla_states, "WALK"), (gla_states, "SWEEP"), (gla_backward, "KEYS"))})


def delta(B: int, T: int, K: int, V: int, peer: bool, gated: bool = False) -> Case:
    from stepladder.kernels import delta as forward
    from stepladder.kernels import delta_backward
    from stepladder.ops import delta as ops
    start = torch.zeros(B, T, dtype=torch.bool, device="cuda")
    inputs = {"q": randn(B, T, HEADS, K) * K**-0.5, "k": F.normalize(randn(B, T, HEADS, K), dim=-1),
              "v": randn(B, T, HEADS, V), "beta": randn(B, T, HEADS, dtype=torch.float32).sigmoid(),
              "S": randn(B, HEADS, K, V, dtype=torch.float32)}
    if gated:
        inputs["g"] = F.logsigmoid(randn(B, T, HEADS, dtype=torch.float32)) / 4
    theirs = None
    if peer:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        rule = chunk_gated_delta_rule if gated else chunk_delta_rule
        theirs = lambda S, **x: rule(**x, scale=1.0, initial_state=S, output_final_state=True)
    n, C, states = B * T * HEADS, 64, 2 * K * V / 64
    return Case(inputs, lambda g=None, **x: ops.fused(**x, g=g, start=start), theirs,
                (n * (4 * K + 4 * V + 8 + states), n * (8 * K + 6 * V + 16 + states)),
                (n * (6 * K * V + 4 * C * (K + V) + 2 * C * C / 3), n * (18 * K * V + C * (10 * K + 12 * V + 4 * C))),
                {"ACROSS": (forward.ACROSS, K), "REVERSE": (delta_backward.REVERSE, K),
                 "GRADIENTS": (delta_backward.GRADIENTS, max(K, V))})


def ssd(B: int, T: int, K: int, V: int, peer: bool, groups: int = HEADS) -> Case:
    """Retention; with one group Mamba-2 with its steps, which are -g here at rates of 1, beside mamba-ssm."""
    from stepladder.kernels import ssd as kernels
    from stepladder.ops import ssd as ops
    start = torch.zeros(B, T, dtype=torch.bool, device="cuda")
    inputs = {"q": randn(B, T, groups, K) * K**-0.5, "k": randn(B, T, groups, K), "v": randn(B, T, HEADS, V),
              "g": F.logsigmoid(randn(B, T, HEADS, dtype=torch.float32)) / 16,
              "S": randn(B, HEADS, K, V, dtype=torch.float32)}
    theirs = None
    if groups == 1:
        inputs |= {"dt": -inputs["g"], "D": torch.ones(HEADS, device="cuda")}
    if peer and groups == HEADS:
        from fla.ops.simple_gla import chunk_simple_gla
        theirs = lambda S, **x: chunk_simple_gla(**x, scale=1.0, initial_state=S, output_final_state=True)
    elif peer:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan
        rates = -torch.ones(HEADS, device="cuda")
        theirs = lambda q, k, v, g, S, dt, D: scan(v, dt, rates, k, q, 256, D=D, initial_states=S.mT,
                                                   return_final_states=True)
    n, C, share, states = B * T * HEADS, 64, groups / HEADS, 2 * K * V / 64
    return Case(inputs, lambda **x: ops.fused(**x, start=start), theirs,
                (n * (4 * K * share + 4 * V + 4 + states), n * (8 * K * share + 6 * V + 8 + states)),
                (n * (4 * K * V + 2 * C * (K * share + V)), n * (10 * K * V + C * (6 * K * share + 4 * V))),
                {name: (vars(kernels)["HALF"], name) for name in kernels.HALF})


def scan(B: int, T: int, K: int, V: int, peer: bool) -> Case:
    """Mamba of 2 V channels a head, whatever K is; its floor is that of the special-function units."""
    from stepladder.ops import scan as ops
    D, N, start = 2 * V * HEADS, 16, torch.zeros(B, T, dtype=torch.bool, device="cuda")
    inputs = {"q": randn(B, T, N, dtype=torch.float32), "k": randn(B, T, N, dtype=torch.float32), "v": randn(B, T, D),
              "dt": F.softplus(randn(B, T, D, dtype=torch.float32) - 4), "h": randn(B, D, N, dtype=torch.float32),
              "A": -torch.arange(1.0, N + 1, device="cuda").expand(D, N).contiguous()}
    n, power = B * T * D, RATE / (132 * 16 * 1.755e9)       # of 2, in products
    return Case(inputs, lambda **x: ops.fused(**x, start=start), None, (n * (8 + 2 * N / 8), n * (14 + 2 * N / 8)),
                (n * N * power, n * 2 * N * power), {})


def prologue(B: int, T: int, K: int, V: int, peer: bool) -> Case:
    from stepladder.kernels import conv as kernels
    from stepladder.ops import conv as ops
    sizes, W = [HEADS * K, HEADS * K, HEADS * V], 4
    C, start = sum(sizes), torch.zeros(B, T, dtype=torch.bool, device="cuda")
    inputs = {"x": randn(B, T, C), "w": randn(C, W, dtype=torch.float32), "before": randn(B, W - 1, C)}
    theirs = None
    if peer:
        from fla.modules.convolution import causal_conv1d
        from fla.modules.l2norm import l2_norm

        def theirs(x: Tensor, w: Tensor, before: Tensor) -> tuple[Tensor, ...]:
            y = causal_conv1d(x, w, activation="silu", initial_state=F.pad(before.mT, (1, 0)))[0]
            q, k, v = (z.unflatten(-1, (HEADS, -1)) for z in y.split(sizes, -1))
            return l2_norm(q) * K**-0.5, l2_norm(k), v.contiguous()
    n = B * T * C
    return Case(inputs, lambda x, w, before: tuple(ops.fused(x, w, start, before, None, sizes, [K**-0.5, 1.0, 0.0], K)),
                theirs, (4 * n, 6 * n), (0, 0),
                {"FORWARD": (vars(kernels)["FORWARD"], "conv"), "BACKWARD": (vars(kernels)["BACKWARD"], "conv")})


def epilogue(B: int, T: int, K: int, V: int, peer: bool) -> Case:
    from stepladder.ops import norm as ops
    inputs = {"y": randn(B, T, HEADS, V), "scale": randn(1, V, dtype=torch.float32), "gate": randn(B, T, HEADS, V)}
    theirs = None
    if peer:
        from fla.modules.fused_norm_gate import rms_norm_gated
        theirs = lambda y, scale, gate: (rms_norm_gated(y, gate, scale[0], None, eps=1e-6),)
    n = B * T * HEADS * V
    return Case(inputs, lambda **x: (ops.fused(**x, first=False),), theirs, (6 * n, 10 * n), (0, 0), {})


FAMILIES: dict[str, Callable[[int, int, int, int, bool], Case]] = {
    "gla": gla, "delta": delta, "gated_delta": partial(delta, gated=True),
    "retention": ssd, "mamba2": partial(ssd, groups=1), "scan": scan,
    "prologue": prologue, "epilogue": epilogue}


def calls(case: Case, f: Callable[..., Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward and backward."""
    leaves = {n: z.requires_grad_() if z.is_floating_point() else z for n, z in case.inputs.items()}
    wrt = [z for z in leaves.values() if z.requires_grad]
    with torch.no_grad():
        weights = [torch.randn_like(z) for z in f(**leaves)]

    def both() -> None:
        torch.autograd.grad(f(**leaves), wrt, weights, allow_unused=True)     # a peer may take one input for two

    return lambda: f(**leaves), both


def rows(case: Case, repeats: int) -> Iterator[tuple[str, float, float, float, float]]:
    """(whose, first call s, forward ms, forward + backward ms, peak MiB), the sides taking turns."""
    runs, first = {}, {}
    for name, f in (("ours", case.ours), ("peer", case.peer)):
        if f is not None:
            began = time.perf_counter()
            runs[name] = calls(case, f)
            try:
                runs[name][1]()
            except RuntimeError as e:      # fla has no gated backward pass on Hopper with triton before 3.7.1
                if name == "ours":
                    raise
                print(f"{name} has no backward pass here; 0 stands for it: {e}")
                runs[name] = runs[name][0], lambda: None
            torch.cuda.synchronize()
            first[name] = time.perf_counter() - began
    taken: dict[str, list[list[float]]] = {name: [[], []] for name in runs}
    for i in range(repeats + 3):
        for name, pair in runs.items():
            for f, times in zip(pair, taken[name], strict=True):
                took = milliseconds(f)
                if i >= 3:
                    times.append(took)
    for name, (forward, both) in taken.items():
        yield name, first[name], median(forward), median(both), peak(runs[name][1]) / 2**20


def choices(case: Case) -> Iterator[str]:
    """The tables' first configurations, then each other one by itself."""
    yield ""
    for name, (space, key) in case.tables.items():
        table = space[key]
        for one in table[1:]:
            space[key] = (one,)
            yield f" {name} {one}"
        space[key] = table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peer", action="store_true", help="flash-linear-attention beside it; it must be installed")
    parser.add_argument("--configs", action="store_true", help="every configuration of the family's tables")
    args = parser.parse_args()
    print(f"{args.family}, {torch.cuda.get_device_name()}, {args.tokens} tokens, {HEADS} heads\n")
    print("| T, K, V | | forward ms | forward + backward ms | floors ms | peak MiB | first call s |\n|" + "---|" * 7)
    for T, K, V in SHAPES:
        if args.tokens < T:
            continue
        case = FAMILIES[args.family](args.tokens // T, T, K, V, args.peer)
        floors = [max(b / BANDWIDTH, f / RATE) * 1e3 for b, f in zip(case.bytes, case.flops, strict=True)]
        for which in choices(case) if args.configs else ("",):
            try:
                for name, first, forward, both, memory in rows(case, args.repeats):
                    print(f"| {T}, {K}, {V} | {name}{which} | {forward:.3f} | {both:.3f} | {floors[0]:.3f} / "
                          f"{sum(floors):.3f} | {memory:.0f} | {first:.1f} |", flush=True)
            except (torch.OutOfMemoryError, OutOfResources) as e:
                print(f"| {T}, {K}, {V} |{which} | {type(e).__name__} | | | | |", flush=True)


if __name__ == "__main__":
    main()
