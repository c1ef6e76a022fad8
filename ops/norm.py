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
    """x (..., D) over its last dimension times scale (..., D); statistics in fp32, result in x's dtype."""
    return (F.rms_norm(promote(x), (x.shape[-1],), eps=EPS) * scale).to(x.dtype)


def gated_norm(y: Tensor, scale: Tensor, gate: Tensor, first: bool = False) -> Tensor:
    """A recurrent mixer's rows y (..., V), normed one by one and gated by silu(gate (..., V)), in the gate's dtype.

    scale (V,) of every row, or (G, V) of rows (..., G, V). first: gated before the norm, as in Mamba-2.
    """
    if gate.shape != y.shape or scale.shape not in (y.shape[-1:], y.shape[-2:]):
        raise ValueError(f"rows {(*y.shape,)} do not go with a gate {(*gate.shape,)} and a scale {(*scale.shape,)}: "
                         "the gate is like them, the scale of their last dimension or of the last two")
    longest = kernels.LONGEST if kernels else 0
    if runs("norm", y, y.dtype, None if y.shape[-1] <= longest else f"rows of {y.shape[-1]}, more than {longest}"):
        return fused(y.contiguous(), scale if scale.dim() == 2 else scale.unsqueeze(0), gate.contiguous(), first)
    if first:
        return rms_norm(promote(y) * F.silu(promote(gate)), scale).to(gate.dtype)
    return rms_norm(y, scale).to(gate.dtype) * F.silu(gate)


def l2_norm(x: Tensor) -> Tensor:
    """x (..., K) at length 1 over its last dimension; a zero stays zero, with a gradient."""
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


@torch.library.custom_op("stepladder::gated_norm", mutates_args=())
def fused(y: Tensor, scale: Tensor, gate: Tensor, first: bool) -> Tensor:
    """y and gate (..., V), scale (G, V) of rows that are G to a token."""
    return kernels.forward(y, scale, gate, first, EPS)


@fused.register_fake
def _(y: Tensor, scale: Tensor, gate: Tensor, first: bool) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("stepladder::gated_norm_backward", mutates_args=())
def _backward(y: Tensor, scale: Tensor, gate: Tensor, first: bool, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, scale (in fp32) and gate."""
    return kernels.backward(y, scale, gate, first, EPS, dout.contiguous())


@_backward.register_fake
def _(y: Tensor, scale: Tensor, gate: Tensor, first: bool, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), scale.new_empty(scale.shape, dtype=torch.float32), torch.empty_like(gate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.first = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, scale, gate = ctx.saved_tensors
    dy, dscale, dgate = _backward(y, scale, gate, ctx.first, dout)
    return dy, dscale.to(scale.dtype), dgate, None


fused.register_autograd(_gradients, setup_context=_save)
