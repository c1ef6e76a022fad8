"""Root-mean-square normalisation (arXiv:1910.07467), and what recurrent mixers norm their heads with."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepladder.ops.kernels import runs
from stepladder.ops.linear import promote

try:
    from stepladder.kernels import norm as kernels
except ModuleNotFoundError:     # without triton, which comes with torch for CUDA, the torch form runs
    kernels: Any = None

EPS = 1e-6


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """x (..., D) over its last dimension times scale (D,); statistics in fp32, result in x's dtype."""
    return (F.rms_norm(promote(x), (x.shape[-1],), eps=EPS) * scale).to(x.dtype)


def gated_norm(y: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """A recurrent mixer's heads y (..., V), normed one by one and gated by silu(gate (..., V)), in the gate's dtype."""
    if runs("norm", y, y.dtype, None if y.shape[-1] <= 1024 else f"heads of {y.shape[-1]}, more than 1024"):
        return fused(y.contiguous(), scale, gate.contiguous())
    return rms_norm(y, scale).to(gate.dtype) * F.silu(gate)


def l2_norm(x: Tensor) -> Tensor:
    """x (..., K) at length 1 over its last dimension; a zero stays zero, with a gradient."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


@torch.library.custom_op("stepladder::gated_norm", mutates_args=())
def fused(y: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return kernels.forward(y, scale, gate, EPS)


@fused.register_fake
def _(y: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("stepladder::gated_norm_backward", mutates_args=())
def _backward(y: Tensor, scale: Tensor, gate: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, scale (in fp32) and gate."""
    return kernels.backward(y, scale, gate, EPS, dout.contiguous())


@_backward.register_fake
def _(y: Tensor, scale: Tensor, gate: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), scale.new_empty(scale.shape, dtype=torch.float32), torch.empty_like(gate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    y, scale, gate = ctx.saved_tensors
    dy, dscale, dgate = _backward(y, scale, gate, dout)
    return dy, dscale.to(scale.dtype), dgate


fused.register_autograd(_gradients, setup_context=_save)
