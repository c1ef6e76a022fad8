"""One GPU: a whole token-mixing layer, forward and backward, beside flash-linear-attention's with as many weights.

    python tests/bench/layers.py --peer [--layers gla deltanet ...] [--shapes 8x2048 4x8192 1x32768]
    python tests/bench/layers.py --peer --warm --layers gla      the first calls alone: some minutes of compiling
    python tests/bench/layers.py --small --device cpu            a toy of ours, to try this script

Ours is compiled as in training. Weights are bf16, but for ours of one dimension; gradients are of the input and of
every weight. Sides take turns; time is the median between CUDA events, with the host ahead; memory the peak of forward
and backward above weights and input. The peer chooses its configurations in its first timed run, alone on the GPU:
those chosen beside other processes, in a warm run, are not kept.
"""
from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
from timing import milliseconds, peak
from torch import Tensor, nn

from stepladder.model.config import BlockConfig, ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import blocks
from stepladder.model.mixer import TokenMixer
from stepladder.model.registry import CHANNEL, TOKEN, find
from stepladder.parallel.build import build
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.support import Parallel


class Sizes(NamedTuple):
    width: int
    heads: int
    head: int                 # channels of a head's keys, and of its values


BIG, SMALL = Sizes(2048, 16, 128), Sizes(64, 2, 32)
AHEAD = 24                    # some 8 ms, in which the host calls all of a layer
SHAPES = ("8x2048", "4x8192", "1x32768")


def spec(kind: str, sizes: Sizes) -> dict[str, int]:
    """Mamba and Mamba-2 as published: twice the width inside, and states of 16 and 128 entries a channel."""
    D, H, K = sizes
    return {"attention": {"heads": H, "head_dim": K}, "mamba": {"inner": 2 * D},
            "mamba2": {"heads": 4 * H, "value_dim": K // 2, "key_dim": K},
            }.get(kind, {"heads": H, "key_dim": K, "value_dim": K})


def ours(kind: str, sizes: Sizes, device: torch.device, compiled: bool = True) -> TokenMixer:
    block = BlockConfig(find(TOKEN, kind).Spec(**spec(kind, sizes)), find(CHANNEL, "swiglu").Spec(hidden=64))
    cfg = ModelConfig(vocab=64, width=sizes.width, layers=1, blocks={"a": block}, pattern=("a",))
    parts = build(cfg, Mesh(Parallel(), device), seed=0, dtype=torch.bfloat16, compiled=compiled)
    layer = blocks(parts.decoder)[0].token
    for p in layer.parameters():
        if p.dim() > 1:
            p.data = p.data.bfloat16()
    return layer


def forward(layer: TokenMixer, B: int, T: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The layer on rows of one document each; what all layers of a model share is made beforehand."""
    ctx = Context.plain(B, T, device)
    ctx = ctx._replace(table=layer.table(ctx, torch.float32))
    return lambda x: layer(x, ctx)


def theirs(kind: str, sizes: Sizes) -> nn.Module | None:
    D, H, K = sizes
    from fla import layers as fla
    if kind == "mamba2":
        from fla.layers import mamba2
        if not mamba2.is_fast_path_available:
            print("mamba2: without mamba-ssm the peer has no kernels; install it to have its row", flush=True)
            return None
        # Not in training mode, where it calls a convolution of another package: the rest, and gradients, are the same.
        return fla.Mamba2(hidden_size=D, head_dim=K // 2, state_size=K).eval()
    make: dict[str, Callable[[], nn.Module]] = {
        "gla": lambda: fla.GatedLinearAttention(hidden_size=D, num_heads=H, expand_k=H * K / D, expand_v=H * K / D),
        "deltanet": lambda: fla.DeltaNet(hidden_size=D, num_heads=H, expand_k=H * K / D, expand_v=H * K / D),
        "gated_delta": lambda: fla.GatedDeltaNet(hidden_size=D, num_heads=H, head_dim=K, expand_v=1.0)}
    return make[kind]() if kind in make else None


class Side(NamedTuple):
    name: str
    weights: int
    forward: Callable[[], Any]
    both: Callable[[], Any] | None      # forward and backward


def side(name: str, layer: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor) -> Side:
    wrt, dy = [x, *(p for p in layer.parameters() if p.requires_grad)], torch.randn_like(x)
    return Side(name, sum(p.numel() for p in layer.parameters()), lambda: f(x),
                lambda: torch.autograd.grad(f(x), wrt, dy))


def sides(kind: str, B: int, T: int, sizes: Sizes, device: torch.device, peer: bool) -> Iterator[Side]:
    torch.manual_seed(0)
    x = torch.randn(B, T, sizes.width, dtype=torch.bfloat16, device=device, requires_grad=True)
    layer = theirs(kind, sizes) if peer else None
    if layer is not None:
        layer = layer.to(device, torch.bfloat16)
        yield side("fla", layer, lambda x: layer(x)[0], x)
    layer_ours = ours(kind, sizes, device, compiled=device.type == "cuda")
    yield side("ours", layer_ours, forward(layer_ours, B, T, device), x)


def first(one: Side, device: torch.device) -> tuple[Side, float] | None:
    """Its first call, in seconds. A peer whose backward pass refuses this machine goes on with its forward pass."""
    began = time.perf_counter()
    for f, without in ((one.both, "backward pass"), (one.forward, "forward pass either")):
        try:
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return one._replace(both=one.both if f is one.both else None), time.perf_counter() - began
        except Exception as e:               # of any kind: packages refuse in their own ways
            if one.name == "ours":
                raise
            print(f"{one.name} has no {without} here: {type(e).__name__}: {e}"[:300].splitlines()[0], flush=True)
    return None


def compare(kind: str, shape: str, sizes: Sizes, device: torch.device, args: argparse.Namespace) -> None:
    torch.compiler.reset()                   # each shape's first call compiles, and says how long that takes
    (B, T), cuda = map(int, shape.split("x")), device.type == "cuda"
    begun = [*filter(None, (first(one, device) for one in sides(kind, B, T, sizes, device, args.peer)))]
    if args.warm:
        print(f"{kind} {shape}: first calls {', '.join(f'{one.name} {s:.1f} s' for one, s in begun)}", flush=True)
        return
    times: dict[tuple[str, int], list[float]] = {}
    for i in range(args.repeats + 2):
        for one, _ in begun:
            for which, f in enumerate((one.forward, one.both)):
                took = milliseconds(f, cuda, AHEAD) if f else float("nan")
                if i >= 2:
                    times.setdefault((one.name, which), []).append(took)
    mid = {key: median(values) for key, values in times.items()}
    for one, s in begun:
        a, b = mid[one.name, 0], mid[one.name, 1]
        beside = one.name == "ours" and len(begun) > 1
        ratio = " / ".join(f"{mid['fla', i] / mid['ours', i]:.2f}" for i in range(2)) if beside else ""
        print(f"| {kind} | {shape} | {one.name} | {one.weights:,} | {a:.2f} | {b:.2f} | {B * T / b * 1e3:,.0f} | "
              f"{ratio} | {peak(one.both or one.forward, cuda) / 2**30:.2f} | {s:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["gla", "deltanet", "gated_delta", "mamba2"], choices=TOKEN)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x tokens")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peer", action="store_true", help="flash-linear-attention beside it; it must be installed")
    parser.add_argument("--warm", action="store_true", help="first calls alone; several families may run at once")
    parser.add_argument("--small", action="store_true", help="a toy, to try this script")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.peer and find_spec("fla") is None:
        parser.error("--peer compares with flash-linear-attention, which is not installed")
    if args.warm:
        os.environ["FLA_CACHE_RESULTS"] = "0"
    device, sizes, shapes = torch.device(args.device), BIG, args.shapes
    if args.small:
        sizes, shapes = SMALL, ("2x64", "1x100")
    if not args.warm:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, width {sizes.width}, {sizes.heads} heads of {sizes.head}, bf16\n")
        print("| layer | rows x tokens | | weights | forward ms | forward + backward ms | tokens/s | faster than fla | "
              "peak GiB | first call s |\n|" + "---|" * 10, flush=True)
    for kind in args.layers:
        for shape in shapes:
            try:
                compare(kind, shape, sizes, device, args)
            except torch.OutOfMemoryError:
                print(f"| {kind} | {shape} | out of memory | | | | | | | |", flush=True)


if __name__ == "__main__":
    main()
