"""Root-mean-square normalisation (arXiv:1910.07467), and what recurrent mixers norm their heads with."""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.linear import promote

EPS = 1e-6


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x (..., D) over its last dimension times scale (D,); statistics in fp32, result in x's dtype."""
    return (F.rms_norm(promote(x), (x.shape[-1],), eps=EPS) * scale).to(x.dtype)


def gated_norm(y: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """A recurrent mixer's heads y (..., V), normed one by one and gated by silu(gate (..., V)), in the gate's dtype."""
    return rms_norm(y, scale).to(gate.dtype) * F.silu(gate)


def l2_norm(x: Tensor) -> Tensor:
    """x (..., K) at length 1 over its last dimension; a zero stays zero, with a gradient."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()
