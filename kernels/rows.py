"""Rows of experts' products gathered for their tokens, weighed and summed; and the way back. Memory is all they cost:
each row is read once and each result written once, a token or a row a program."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import cdiv, power

BLOCK, WARPS = 2048, 4          # numbers of a row that a program reads at once: 16 a thread


@triton.jit
def _collect(x, at, weights, out, M, D: tl.constexpr, K: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    u, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        i = tl.load(at + u * K + j)
        row = tl.load(x + i * D + d, mask=(i < M) & (d < D), other=0.0).to(tl.float32)
        if WEIGHED:
            row *= tl.load(weights + u * K + j).to(x.dtype.element_ty).to(tl.float32)
        total += row
    tl.store(out + u * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _weigh_back(dy, x, weights, order, dx, dweights, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    c = tl.load(order + m)
    w, total = tl.load(weights + c).to(x.dtype.element_ty).to(tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in tl.static_range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        g = tl.load(dy + c // K * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += g * tl.load(x + m * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dx + m * D + d, (w * g).to(dx.dtype.element_ty), mask=d < D)
    tl.store(dweights + c, tl.sum(total))


def collect(x: Tensor, at: Tensor, weights: Tensor | None) -> Tensor:
    """x (M, D), at (U, k), weights (U, k) -> (U, D), summed in fp32; nothing where `at` is M or more."""
    (M, D), (U, k) = x.shape, at.shape
    out, block = x.new_empty(U, D), min(BLOCK, power(D))
    _collect[U, cdiv(D, block)](x, at, at if weights is None else weights, out, M, D, k, weights is not None, block,
                                num_warps=WARPS)
    return out


def weigh_back(dy: Tensor, x: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (M, D) and weights (U, k) from that (U, D) of collect()'s; order (M,) is where `at` has each."""
    D, dx, dweights = x.shape[1], torch.empty_like(x), torch.zeros_like(weights)
    _weigh_back[(x.shape[0],)](dy, x, weights, order, dx, dweights, D, weights.shape[1], min(BLOCK, power(D)),
                               num_warps=WARPS)
    return dx, dweights
