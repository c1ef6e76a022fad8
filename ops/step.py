"""Decoding: one more token of a recurrence in one launch, the state updated in place.

Where steps() says so; recurrent() of ops/gla.py, ssd.py, delta.py and scan.py say what is computed.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepladder.ops.kernels import runs

try:
    from stepladder.kernels import step as kernels
except ModuleNotFoundError:     # without triton, which comes with torch for CUDA, the torch form runs
    kernels: Any = None

SIDE = 256                      # of a state: a program holds as many rows


def steps(v: Tensor, state: Tensor, side: int, *others: Tensor | None) -> bool:
    """Whether v (B, 1, ...) moves `state` on by matrix() or scan(); side: its key channels, or entries a channel."""
    wanted = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in (v, state, *others))
    if wanted or v.shape[1] != 1:
        return False
    return runs("step", v, v.dtype,
                None if state.dtype == torch.float32 and state.is_contiguous() else "states but fp32 in one piece",
                None if side <= SIDE else f"{side} rows of a state, more than {SIDE}")


def fit(state: Tensor, **said: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises ValueError for the first tensor that is not of the shape beside it: a kernel would not notice."""
    for name, (z, shape) in said.items():
        if z is not None and z.shape != shape:
            raise ValueError(f"{name} is {(*z.shape,)}, but one token of a state {(*state.shape,)} needs {shape}; a "
                             "state is made by the begin() of the mixer that steps on it")


@torch.library.custom_op("stepladder::step", mutates_args=("S",))
def matrix(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, start: Tensor, S: Tensor,
           scale: float = 1.0) -> Tensor:
    """y (B, 1, H, V) for scale q; g (B, 1, H), (B, 1, H, K) or none at all; the delta rule's where beta is given."""
    (B, H, K, V), G = S.shape, q.shape[2]
    fit(S, q=(q, (B, 1, G, K)), k=(k, (B, 1, G, K)), v=(v, (B, 1, H, V)), start=(start, (B, 1)),
        g=(g, (B, 1, H, K)[:3 if g is None else g.dim()]), beta=(beta, (B, 1, H)))
    if H % G:
        raise ValueError(f"{G} heads of queries and keys are not shared evenly by the state's {H}")
    return kernels.matrix(q, k, v, g, beta, start, S, scale)


@matrix.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, start: Tensor, S: Tensor,
      scale: float = 1.0) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("stepladder::scan_step", mutates_args=("h",))
def scan(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor) -> Tensor:
    """y (B, 1, D)"""
    B, D, N = h.shape
    fit(h, q=(q, (B, 1, N)), k=(k, (B, 1, N)), v=(v, (B, 1, D)), dt=(dt, (B, 1, D)), A=(A, (D, N)),
        start=(start, (B, 1)))
    return kernels.scan(q, k, v, dt, A, start, h)


@scan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, start: Tensor, h: Tensor) -> Tensor:
    return v.new_empty(v.shape)
