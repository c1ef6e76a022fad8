"""Random small cases of every kernel family against its definition in fp64: outputs and every gradient.

    make random-cases                                                      10,000 on a GPU
    python tests/random_cases.py [--cases 10000] [--families gla delta ...] [--workers 16] [--seconds 540] [--seed 0]
    python tests/random_cases.py --seed 0 --case 1234                      one of them again
    TRITON_INTERPRET=1 python tests/random_cases.py --cases 20             a few without a GPU

A build is what kernels are compiled for: sizes and types. A case is a build and what its own generator draws: rows,
documents, gates, states, segments. The cases of a build run in a process of their own, so that one that leaves the GPU
in ruins takes few with it. Memory is poisoned. Bars are those of the families' own tests, for the coarsest type among
the inputs: outputs may be of it, and what is sent back to them. An error beyond its bar may be the input's fault and
not the kernel's, where terms cancel: then rounding the inputs once more, with nothing but fp64 after that, does more
than half a unit in the last place, which is usual. The bar is raised by as much, the most that a few roundings do, as
each is a draw; such cases are counted by themselves.
"""
from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle, product, zip_longest
from typing import Any, NamedTuple

import torch
from fused import BAR, HALF, SINGLE, outcome, poison, ratio
from torch import Tensor
from torch.nn import functional as F

from stepladder.kernels.tiles import INTERPRET
from stepladder.ops import conv, delta, gla, norm, scan, ssd, step

Tensors = dict[str, Tensor]
CHUNK, LONGEST, ROWS = (16, 40, (1, 1, 2)) if INTERPRET else (64, 300, (1, 1, 2, 3))
GATES: dict[str, Callable[[Tensor], Tensor]] = {         # of numbers in [0, 1)
    "0": lambda u: 0 * u, "-0.001": lambda u: 0 * u - 1e-3, "-0.04": lambda u: 0 * u - 0.04,
    "-0.1 to 0": lambda u: -u / 10, "-1 to 0": lambda u: -u, "-5 to 0": lambda u: -5 * u, "-5": lambda u: 0 * u - 5,
    "-50": lambda u: 0 * u - 50,
    "of all sizes": lambda u: -torch.tensor([0, 1e-3, 5, 50])[(4 * u).long()],
    "now and then -1e3": lambda u: torch.where(u > 0.95, -1e3, -u / 100),
    "now and then -inf": lambda u: torch.where(u > 0.95, -torch.inf, -u / 100)}
FINITE = [name for name in GATES if name != "now and then -inf"]        # the others have differences of their sums
STEPS = [name for name in FINITE if name != "now and then -1e3"]        # a step of the scan is what it writes, too
BARS: dict[str, dict[str, float]] = {                    # of 16 bits; "" is for what has no bar of its own
    "gla": {"": 8e-3, "y": 5e-3, "S": 5e-3, "dg": 2e-2}, "ssd": {"": 8e-3, "y": 5e-3, "S": 5e-3, "dg": 2e-2},
    "delta": {"": 8e-3, "dg": 2e-2, "dbeta": 2e-2, "dk": 1e-2},
    "scan": {"": 8e-3, "y": 5e-3, "S": 5e-3, "ddt": 2e-2, "dA": 2e-2},
    "conv": {"": 8e-3, "y": 5e-3}, "norm": {"": 5e-3, "dscale": 8e-3}, "step": {"": 5e-3, "S": 1e-5}}
FP32 = BAR[SINGLE] if INTERPRET else 1e-4                # on a GPU its products are of three tf32 passes
ROUNDINGS = 4
PIECE = 50           # cases that a process is given and reports at once; the next of a build find its kernels compiled
TYPES = (SINGLE, HALF) if INTERPRET else (torch.bfloat16, HALF, SINGLE)
# gla: K, V, H; delta, ssd and step: K, V, H, G; scan: D, N; norm: V; conv: parts, their lengths, head, taps, bias.
SIZES: dict[str, list[Any]] = {
    "gla": [(16, 16, 3), (32, 32, 2), (64, 64, 4), (64, 128, 3), (128, 128, 2), (128, 64, 1), (128, 256, 2)],
    "delta": [(32, 32, 2, 2), (64, 64, 4, 2), (128, 128, 2, 1), (128, 256, 2, 2), (256, 256, 1, 1)],
    "ssd": [(128, 64, 6, 1), (128, 128, 2, 2), (64, 64, 4, 2), (32, 48, 3, 1), (16, 256, 2, 2), (128, 256, 2, 1)],
    "scan": [(64, 16), (200, 16), (96, 8), (48, 32), (24, 4)], "norm": [64, 128, 256, 96, 4096],
    "conv": [((128, 128, 256), (128**-0.5, 1.0), 64, 4, False), ((200,), (), 1, 4, True), ((96, 8, 8), (), 1, 2, True),
             ((8, 16), (1.0,), 8, 3, False), ((32, 64), (0.0, 2.0), 32, 1, False)],
    "step": [(128, 128, 4, 2), (64, 64, 16, 16), (256, 72, 2, 1)],
}
SMALL: dict[str, list[Any]] = {
    "gla": [(16, 16, 2), (16, 32, 1)], "delta": [(16, 16, 2, 1), (16, 32, 2, 2)],
    "ssd": [(16, 16, 2, 1), (16, 48, 2, 2)], "scan": [(8, 4), (20, 16)], "norm": [16, 24],
    "conv": [((16, 16, 16), (0.25, 1.0), 16, 4, False), *SIZES["conv"][2:]], "step": [(8, 16, 2, 1), (12, 20, 4, 4)],
}
if INTERPRET:
    SIZES = SMALL


class Build(NamedTuple):
    family: str
    dtype: torch.dtype
    sizes: dict[str, Any]


class Case(NamedTuple):
    inputs: Tensors
    fast: Callable[..., tuple[Tensor, ...]]
    definition: Callable[..., tuple[Tensor, ...]]


class Draw:
    """What a case draws, from the processor's generators: the same on every device."""

    def __init__(self, seed: int, case: int):
        self.random = random.Random(f"{seed} {case}")
        self.gen = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.said: dict[str, Any] = {}                   # what is printed of it

    def pick(self, name: str, *choices: Any) -> Any:
        self.said[name] = self.random.choice(choices)
        return self.said[name]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.gen)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.gen)

    def tokens(self, kind: str, least: int = 1) -> int:
        """Of a row: even are whole chunks; else no multiple of 16, which kernels may be compiled for."""
        low, high = {"short": (least, CHUNK), "long": (CHUNK + 1, LONGEST)}.get(kind, (2, LONGEST // CHUNK))
        n = self.random.randint(low, high)
        self.said["T"] = n * CHUNK if kind == "even" else n - (n % 16 == 0)
        return self.said["T"]

    def borders(self, B: int, T: int) -> Tensor:
        """Of every row by itself."""
        starts = {"none": lambda u: u < 0, "the first": lambda u: torch.arange(T) == 0,
                  "the last": lambda u: torch.arange(T) == T - 1, "every": lambda u: u >= 0,
                  "few": lambda u: u < 0.02, "many": lambda u: u < 0.3}
        names = [self.random.choice([*starts]) for _ in range(B)]
        self.said["documents begin at"] = names
        return torch.stack([starts[name](self.rand(T)) for name in names])

    def gates(self, *shape: int, among: list[str] | None = None) -> Tensor:
        """(B, T, H, ...), of one kind for all heads or one for each."""
        name, names, u = self.pick("gates", "one", "one", "mixed"), among or [*GATES], self.rand(*shape)
        kinds = [self.random.choice(names)] * shape[2] if name == "one" else self.random.choices(names, k=shape[2])
        self.said["gates"] = kinds[0] if name == "one" else kinds
        return torch.stack([GATES[kind](u[:, :, h]) for h, kind in enumerate(kinds)], 2)

    def state(self, *shape: int) -> Tensor:
        return self.randn(*shape) * self.pick("state", 0, 1, 1)


def form(op: Any, T: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The recurrence, or for long rows the chunked form: the same in fp64, in a tenth of the time."""
    return op.recurrent if T <= CHUNK else op.chunked


def gla_case(d: Draw, dtype: torch.dtype, K: int, V: int, H: int, rows: str) -> Case:
    """Kernels are compiled for kinds of rows."""
    B, T = d.pick("B", *ROWS), d.tokens("long" if rows == "segments" else rows, least=2)
    x = {"q": d.randn(B, T, H, K) * K**-0.5, "k": d.randn(B, T, H, K) * K**-0.5, "v": d.randn(B, T, H, V)}
    x = {n: z.to(dtype) for n, z in x.items()} | {
        "g": d.gates(B, T, H, K, among=FINITE), "start": d.borders(B, T), "S": d.state(B, H, K, V)}
    return Case(x, partial(gla.fused, chunk=CHUNK, segment=99 if rows == "segments" else 1), form(gla, T))


def ssd_case(d: Draw, dtype: torch.dtype, K: int, V: int, H: int, G: int) -> Case:
    B, T = d.pick("B", *ROWS), d.tokens(d.random.choice(["short", "long", "even"]))
    x = {"q": d.randn(B, T, G, K) * K**-0.5, "k": d.randn(B, T, G, K), "v": d.randn(B, T, H, V)}
    x = {n: z.to(dtype) for n, z in x.items()} | {"g": d.gates(B, T, H), "start": d.borders(B, T),
                                                  "S": d.state(B, H, K, V)}
    if d.pick("steps", False, True):
        x |= {"dt": d.pick("steps to", 0.01, 1.0, 10.0) * d.rand(B, T, H), "D": d.randn(H)}
    return Case(x, partial(ssd.fused, chunk=CHUNK, segments=d.pick("segments", 1, 3)), form(ssd, T))


def delta_case(d: Draw, dtype: torch.dtype, K: int, V: int, H: int, G: int, gated: bool, length: int) -> Case:
    """Keys of any direction, or all alike; length: chunks of a segment, which kernels are compiled for."""
    B, T = d.pick("B", *ROWS), d.tokens(d.random.choice(["short", "long", "even"]))
    k = d.randn(B, T, G, K) + 2 * d.pick("keys alike", 0, 0, 1) * d.randn(B, 1, G, K)
    x = {"q": d.randn(B, T, G, K) * K**-0.5, "k": F.normalize(k, dim=-1), "v": d.randn(B, T, H, V)}
    beta = {"to 1": lambda u: u, "to 2": lambda u: 2 * u, "0 or 2": lambda u: 2 * u.round(), "0": lambda u: 0 * u}
    x = {n: z.to(dtype) for n, z in x.items()} | {
        "beta": beta[d.pick("beta", "to 1", "to 1", "to 2", "0 or 2", "0")](d.rand(B, T, H)),
        "start": d.borders(B, T), "S": d.state(B, H, K, V)}
    if gated:
        x["g"] = d.gates(B, T, H)
    definition = form(delta, T)

    def fast(g: Tensor | None = None, **x: Tensor) -> tuple[Tensor, Tensor]:
        return delta.fused(g=g, **x, chunk=CHUNK, length=length)

    return Case(x, fast, lambda beta, g=None, **x: definition(g=0 * beta if g is None else g, beta=beta, **x))


def scan_case(d: Draw, dtype: torch.dtype, D: int, N: int) -> Case:
    B, T = d.pick("B", *ROWS), d.tokens(d.random.choice(["short", "long", "even"]))
    dt = -d.gates(B, T, D, among=STEPS)
    x = {"q": d.randn(B, T, N) * N**-0.5, "k": d.randn(B, T, N), "v": d.randn(B, T, D).to(dtype), "dt": dt,
         "A": -d.rand(D, N), "start": d.borders(B, T), "h": d.state(B, D, N)}
    return Case(x, partial(scan.fused, segments=d.pick("segments", 1, 3)), form(scan, T))


def conv_case(d: Draw, dtype: torch.dtype, sizes: tuple[int, ...], lengths: tuple[float, ...], head: int, taps: int,
              bias: bool) -> Case:
    C, B, T = sum(sizes), d.pick("B", *ROWS), d.tokens(d.random.choice(["short", "long", "even"]))
    x = {"x": d.randn(B, T, C).to(dtype), "w": d.randn(C, taps).to(dtype).float(), "start": d.borders(B, T),
         "before": d.state(B, taps - 1, C).to(dtype)} | ({"bias": d.randn(C)} if bias else {})
    rest = {"sizes": [*sizes], "lengths": [*lengths, *[0.0] * (len(sizes) - len(lengths))], "head": head}

    def whole(f: Callable[..., list[Tensor]], bias: Tensor | None = None, **x: Tensor) -> tuple[Tensor, Tensor]:
        *parts, after = f(**x, bias=bias, **rest)
        return torch.cat(parts, -1), after

    return Case(x, partial(whole, conv.fused), partial(whole, conv.activated))


def norm_case(d: Draw, dtype: torch.dtype, V: int, gate: torch.dtype) -> Case:
    rows = d.random.randint(1, 3), d.tokens(d.random.choice(["short", "long"])), d.random.randint(1, 4)
    size = d.pick("size", 1e-2, 1, 10)
    groups, first = d.pick("groups", False, True), d.pick("gated first", False, True)
    x = {"y": (size * d.randn(*rows, V)).to(dtype), "scale": 1 + d.randn(*rows[-1:] * groups, V),
         "gate": 2 * d.randn(*rows, V).to(gate)}

    def fast(y: Tensor, scale: Tensor, gate: Tensor) -> tuple[Tensor]:
        return (norm.fused(y, scale.view(-1, V), gate, first),)

    return Case(x, fast, lambda **x: (norm.gated_norm(**x, first=first),))


def step_case(d: Draw, dtype: torch.dtype, kind: str, K: int, V: int, H: int, G: int) -> Case:
    """One token; nothing is learned from it."""
    B = d.pick("B", 1, 2, 3, 5)
    x = {"q": d.randn(B, 1, G, K) * K**-0.5, "k": F.normalize(d.randn(B, 1, G, K), dim=-1), "v": d.randn(B, 1, H, V)}
    x = {n: z.to(dtype) for n, z in x.items()} | {"g": d.gates(B, 1, H, *[K] * (kind == "gla")),
                                                  "start": d.borders(B, 1), "S": d.state(B, H, K, V)}
    if kind == "delta":
        x["beta"] = 2 * d.rand(B, 1, H)

    def fast(S: Tensor, beta: Tensor | None = None, **x: Tensor) -> tuple[Tensor, Tensor]:
        S = S.clone()
        return step.matrix(**x, beta=beta, S=S), S

    return Case(x, fast, {"gla": gla, "ssd": ssd, "delta": delta}[kind].recurrent)


FAMILIES: dict[str, Callable[..., Case]] = {"gla": gla_case, "delta": delta_case, "ssd": ssd_case, "scan": scan_case,
                                            "conv": conv_case, "norm": norm_case, "step": step_case}


def builds() -> Iterator[Build]:
    """What is compiled: on a GPU each of them takes some seconds, once."""
    rows, lengths, gates = cycle(["short", "long", "segments", "even"]), cycle([99, 1, 2]), cycle([TYPES[0], SINGLE])
    by_products = TYPES if INTERPRET else TYPES[:2]     # fp32 takes the torch form there: ops/kernels.py
    for (K, V, H), dtype, _ in product(SIZES["gla"], by_products, range(2)):
        yield Build("gla", dtype, {"K": K, "V": V, "H": H, "rows": next(rows)})
    for (K, V, H, G), dtype, gated in product(SIZES["delta"], by_products, (True, False)):
        yield Build("delta", dtype, {"K": K, "V": V, "H": H, "G": G, "gated": gated, "length": next(lengths)})
    for (K, V, H, G), dtype in product(SIZES["ssd"], by_products):
        yield Build("ssd", dtype, {"K": K, "V": V, "H": H, "G": G})
    for (D, N), dtype in product(SIZES["scan"], TYPES):
        yield Build("scan", dtype, {"D": D, "N": N})
    for (parts, norms, head, taps, bias), dtype in product(SIZES["conv"], TYPES):
        yield Build("conv", dtype, {"sizes": parts, "lengths": norms, "head": head, "taps": taps, "bias": bias})
    for V, dtype in product(SIZES["norm"], TYPES):
        yield Build("norm", dtype, {"V": V, "gate": next(gates) if dtype == SINGLE else dtype})
    for kind, (K, V, H, G), dtype in product(("gla", "ssd", "delta"), SIZES["step"], TYPES):
        yield Build("step", dtype, {"kind": kind, "K": K, "V": V, "H": H, "G": H if kind == "gla" else G})


def spread() -> list[Build]:
    """The builds, those of all families side by side: few cases see them all."""
    families = ([build for build in builds() if build.family == family] for family in FAMILIES)
    return [build for row in zip_longest(*families) for build in row if build]


class Result(NamedTuple):
    family: str
    worst: float              # error by bar
    of: str                   # which tensor's
    raised: bool              # beyond its bar
    wrong: str                # what failed


def results(f: Callable[..., Any], x: Tensors, family: str) -> Tensors:
    if family == "step":
        with torch.no_grad():
            return dict(zip("yS", f(**x), strict=True))
    return outcome(f, x)


def rounded(x: Tensors, dtype: torch.dtype, d: Draw) -> Tensors:
    """Inputs of that type are off by up to half a unit in the last place."""
    off = lambda z: 1 + torch.finfo(dtype).eps * (d.rand(*z.shape).double() - 0.5)
    return {n: z.double() * off(z) if z.dtype == dtype else z for n, z in x.items()}


def judge(build: Build, seed: int, case: int, device: str) -> Result:
    d = Draw(seed, case)
    x, fast, definition = FAMILIES[build.family](d, build.dtype, **build.sizes)
    double = lambda x: {n: z.double() if z.is_floating_point() else z for n, z in x.items()}
    coarsest = max((z.dtype for z in x.values() if z.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps)
    bars = dict.fromkeys(BARS[build.family], FP32) if coarsest == SINGLE else BARS[build.family]
    # The definition stays on the CPU, where it takes 50 ms. On the GPU it is hundreds of small launches, and those of
    # many processes wait for one another.
    got, want = (results(fast, {n: z.to(device) for n, z in x.items()}, build.family),
                 results(definition, double(x), build.family))
    got = {n: z.cpu() for n, z in got.items()}
    found = {n: ratio(got[n], want[n]) / bars.get(n, bars[""]) for n in want if want[n].numel()}
    beyond = {n: 1.0 for n, e in found.items() if not e < 1}
    wrong = beyond
    for _ in range(ROUNDINGS if beyond else 0):
        again = results(definition, double(rounded(x, coarsest, d)), build.family)
        beyond = {n: max(e, ratio(again[n], want[n]) / (torch.finfo(coarsest).eps / 2)) for n, e in beyond.items()}
        wrong = {n: e for n, e in beyond.items() if not found[n] < e}
        if not wrong:
            break
    words = [f"{n} {ratio(got[n], want[n]):.1e} (bar {e * bars.get(n, bars['']):.1e})" for n, e in wrong.items()]
    of = max(found, key=lambda n: (found[n] != found[n], found[n]))
    said = ", ".join(f"{n} {v}" for n, v in (build.sizes | d.said).items())
    return Result(build.family, found[of], of, bool(beyond),
                  f"{', '.join(words)}; {str(build.dtype)[6:]}, {said}" if wrong else "")


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of sums in any order and of the interpreter's overflows; no lines that fp64 has no kernel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        yield
        logging.disable(logging.NOTSET)


def work(task: tuple[Build, list[int]], seed: int, until: float) -> list[tuple[int, Result]]:
    """The cases of a build. What raises may have broken the device: the build's other cases are left out."""
    build, numbers = task
    device, out = "cpu" if INTERPRET else "cuda", []
    with poison(), quiet():
        for i in numbers:
            if time.time() > until:
                break
            try:
                out.append((i, judge(build, seed, i, device)))
            except Exception as e:
                words = f"{type(e).__name__}: {e}".splitlines()[0][:300]
                wrong = f"{words}; {str(build.dtype)[6:]}, {build.sizes}; the rest of its build is left out"
                out.append((i, Result(build.family, float("nan"), "", False, wrong)))
                break
    return out


def parallel(tasks: list[tuple[Build, list[int]]], args: argparse.Namespace, until: float) -> Iterator[Any]:
    """As they are done; a process that dies or hangs is waited for until the time is up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fused", *(f"stepladder.ops.{name}" for name in FAMILIES)])
    with context.Pool(args.workers, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        done = pool.imap_unordered(partial(work, seed=args.seed, until=until), tasks)
        for _ in tasks:
            try:
                yield done.next(max(until - time.time(), 0) + 30)
            except multiprocessing.TimeoutError:
                print("some processes did not come back", flush=True)
                return


def report(found: list[Result], wanted: int, seconds: float) -> None:
    print("\n| family | cases | worst error / bar | of | under a raised bar | failures |\n|" + "---|" * 6)
    for family in FAMILIES:
        mine = [r for r in found if r.family == family]
        if mine:
            fine = [r for r in mine if not r.raised and not r.wrong]
            worst = max(fine, key=lambda r: r.worst, default=Result(family, float("nan"), "none passes", False, ""))
            print(f"| {family} | {len(mine)} | {worst.worst:.2f} | {worst.of} | "
                  f"{sum(r.raised and not r.wrong for r in mine)} | {sum(bool(r.wrong) for r in mine)} |")
    print(f"\n{len(found)} of {wanted} cases, {sum(bool(r.wrong) for r in found)} failures, {seconds:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=FAMILIES)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    args = parser.parse_args()
    if not INTERPRET and not torch.cuda.is_available():
        print("random cases need a CUDA device, or TRITON_INTERPRET=1 to interpret the kernels", file=sys.stderr)
        return 2
    every, began = spread(), time.time()
    numbers = range(args.cases) if args.case is None else [args.case]
    tasks = [(build, [i for i in numbers if i % len(every) == b]) for b, build in enumerate(every)
             if build.family in args.families or args.case is not None]
    # First pieces first: whose kernels others compile already would compile them as well.
    pieces = [(i, build, of[i:i + PIECE]) for build, of in tasks for i in range(0, len(of), PIECE)]
    tasks = [task for _, *task in sorted(pieces, key=lambda piece: (piece[0], [*FAMILIES].index(piece[1].family)))]
    until, found = began + args.seconds, []              # what takes longest to compile goes first
    alone = args.workers == 1 or len(tasks) == 1
    with suppress(KeyboardInterrupt):
        for out in (work(task, args.seed, until) for task in tasks) if alone else parallel(tasks, args, until):
            for i, result in out:
                found.append((i, result))
                if result.wrong:
                    print(f"--seed {args.seed} --case {i}: {result.family}: {result.wrong}", flush=True)
    wanted = sum(len(numbers) for _, numbers in tasks)
    report([result for _, result in found], wanted, time.time() - began)
    if lost := [build for build, numbers in tasks if not {i for i, _ in found}.intersection(numbers)]:
        print(f"of {len(lost)} builds nothing came back, the first {lost[0]}")
    return int(len(found) < wanted or any(r.wrong for _, r in found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)        # who ends it early still reads what was found
    sys.exit(main())
