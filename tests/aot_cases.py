"""The launches of the shapes that a kernel family ships for; tests/aot.py compiles them. A family is a function; those
of all sizes of heads, which take minutes to compile, are for `make hazards`."""
from __future__ import annotations

from itertools import product

import torch

from stepladder.kernels import conv as conv_kernels
from stepladder.kernels import delta as delta_kernels
from stepladder.kernels import delta_backward as delta_backward_kernels
from stepladder.kernels import gla as gla_kernels
from stepladder.kernels import gla_backward as gla_backward_kernels
from stepladder.kernels import norm as norm_kernels
from stepladder.kernels import parts as parts_kernels
from stepladder.kernels import rows as rows_kernels
from stepladder.kernels import scan as scan_kernels
from stepladder.kernels import ssd as ssd_kernels
from stepladder.kernels import ssd_backward as ssd_backward_kernels
from stepladder.kernels import step as step_kernels
from stepladder.ops import delta as delta_ops
from stepladder.ops import gla as gla_ops

BF16 = torch.bfloat16


def conv() -> None:
    """Gated delta of 16 heads of 128, with Mamba's bias besides."""
    sizes, lengths, head, C = [2048] * 3, [128**-0.5, 1.0, 0.0], 128, 6144
    x, before, start = torch.empty(2, 256, C, dtype=BF16), torch.empty(2, 3, C, dtype=BF16), torch.zeros(2, 256).bool()
    args = x, torch.empty(C, 4), torch.empty(C), start, before, sizes, lengths, head, 1e-6
    conv_kernels.forward(*args)
    conv_kernels.backward(*args, [torch.empty(2, 256, n, dtype=BF16) for n in sizes], before)


def norm() -> None:
    """fp32 is what the torch forms hand over. Mamba-2's rows of 4096, and the longest."""
    for G, V, first, dtype in ((1, 128, False, BF16), (1, 128, False, torch.float32), (1, 4096, True, BF16),
                               (2, 8192, True, BF16)):
        y, gate = (torch.empty(2, 256, 16, V, dtype=d) for d in (dtype, BF16))
        scale = torch.empty(G, V)
        norm_kernels.forward(y, scale, gate, first, 1e-6)
        norm_kernels.backward(y, scale, gate, first, 1e-6, gate)


def parts() -> None:
    """Four ranks' of 8 MiB, and eight ranks' in fp32."""
    for n, dtype in ((4, BF16), (8, torch.float32)):
        here, *others = torch.empty(n, 4096, dtype=dtype)
        parts_kernels.add((here, *others), (torch.empty_like(here),) * 2)


def rows() -> None:
    """Four experts of 2,048 numbers; two, of a width that is no power of two, and without weights."""
    for k, D in ((4, 2048), (2, 5120)):
        at, weights, x = torch.zeros(256, k, dtype=torch.long), torch.empty(256, k), torch.empty(256 * k, D, dtype=BF16)
        rows_kernels.collect(x, at, weights if k == 4 else None)
        rows_kernels.weigh_back(x[:256], x, at.flatten(), weights)


def step() -> None:
    """The delta rule at batch 64 and 1, the tiles with most and with fewest columns; its largest state; Mamba."""
    for B, H, K, V in ((64, 16, 128, 128), (1, 16, 128, 128), (64, 6, 256, 512)):
        q, v, S = torch.empty(B, 1, H, K, dtype=BF16), torch.empty(B, 1, H, V, dtype=BF16), torch.empty(B, H, K, V)
        g = torch.empty(B, 1, H)
        step_kernels.matrix(q, q, v, g, g, torch.zeros(B, 1).bool(), S, 1.0)
    x, select, A = torch.empty(64, 1, 4096), torch.empty(64, 1, 16), torch.empty(4096, 16)
    step_kernels.scan(select, select, x, x, A, torch.zeros(64, 1).bool(), torch.empty(64, 4096, 16))


def delta() -> None:
    """16 heads of each size, some with gates and some with an end to fill; one row in segments."""
    for K, V, T, gated, length in ((64, 64, 4096, False, 99), (128, 32, 4096, False, 99), (128, 128, 4096, True, 16),
                                   (128, 256, 4000, True, 99), (256, 256, 4000, False, 99)):
        _delta(K, V, T, gated, length)


def delta_sizes() -> None:
    """Whatever runs by these kernels."""
    for K, V, gated in product(delta_ops.SIZES, delta_ops.SIZES, (False, True)):
        for T, length in ((250, 99), (4096, 16)):
            _delta(K, V, T, gated, length, H=2)


def _delta(K: int, V: int, T: int, gated: bool, length: int, H: int = 16) -> None:
    q, v = torch.empty(1, T, H, K, dtype=BF16), torch.empty(1, T, H, V, dtype=BF16)
    beta, start, S = torch.empty(1, T, H), torch.empty(1, T, dtype=torch.uint8), torch.empty(1, H, K, V)
    saved = delta_kernels.forward(q, q, v, beta if gated else None, beta, start, S, True, 64, length)[2:]
    delta_backward_kernels.backward(q, q, beta if gated else None, beta, start, *saved, v, S, length)


def ssd() -> None:
    """Mamba-2 of one group of 64 heads, 128 x 64, a row in segments, and of heads in three tiles of values. Retention
    of 16 heads, 128 x 128 and 64 x 64."""
    for B, G, H, K, V in ((1, 1, 64, 128, 64), (1, 1, 8, 32, 48), (4, 16, 16, 128, 128), (16, 16, 16, 64, 64)):
        _ssd(B, G, H, K, V, 4000, G == 1)


def ssd_sizes() -> None:
    """Whatever runs by these kernels, as far as it differs: tiles of values, and how many of them."""
    for K, V, steps in product((16, 32, 64, 128), (48, 64, 96, 128, 256), (False, True)):
        for H in (1, 2) if V == 64 else (2,):                    # two heads of 64 in a program
            _ssd(1, 1, H, K, V, 250, steps)


def _ssd(B: int, G: int, H: int, K: int, V: int, T: int, steps: bool) -> None:
    q, v = torch.empty(B, T, G, K, dtype=BF16), torch.empty(B, T, H, V, dtype=BF16)
    g, doc, S = torch.empty(B, T, H), torch.empty(B, T, dtype=torch.int32), torch.empty(B, H, K, V)
    more = (g, torch.empty(H)) if steps else (None, None)
    states = ssd_kernels.forward(q, q, v, g, *more, doc, S, True)[2]
    ssd_backward_kernels.backward(q, q, v, g, *more, doc, states, v, S)


def scan() -> None:
    """Mamba's 4096 channels of 16 entries and rows of few channels of 32, both in segments."""
    for T, D, N in ((512, 4096, 16), (512, 64, 32)):
        q, v, dt, A = torch.empty(1, T, N), torch.empty(1, T, D, dtype=BF16), torch.empty(1, T, D), torch.empty(D, N)
        start, h = torch.zeros(1, T).bool(), torch.empty(1, D, N)
        states = scan_kernels.forward(q, q, v, dt, A, start, h, True)[2]
        scan_kernels.backward(q, q, v, dt, A, start, states, v, h)


def gla() -> None:
    """16 heads of 128 with gates in fp32, which take most."""
    _gla(128, 128, 256, 16)


def gla_sizes() -> None:
    """Whatever runs by these kernels."""
    for K, V in product(gla_ops.KEYS, gla_ops.VALUES):
        for T, H in ((250, 4), (8192, 1)):
            _gla(K, V, T, H)


def _gla(K: int, V: int, T: int, H: int) -> None:
    q, v, g = torch.empty(1, T, H, K, dtype=BF16), torch.empty(1, T, H, V, dtype=BF16), torch.empty(1, T, H, K)
    start, S = torch.empty(1, T, dtype=torch.uint8), torch.empty(1, H, K, V)
    y, S, *saved = gla_kernels.forward(q, q, v, g, start, S, 1.0, True)
    gla_backward_kernels.backward(q, q, v, g, start, *saved, y, S, 1.0)
