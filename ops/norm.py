"""Root-mean-square normalisation (arXiv:1910.07467)."""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.linear import promote

EPS = 1e-6


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x (..., D) over its last dimension times scale (D,); statistics in fp32, result in x's dtype."""
    return (F.rms_norm(promote(x), (x.shape[-1],), eps=EPS) * scale).to(x.dtype)
