"""Short causal convolution of every channel by itself, within documents, with the state that decoding carries."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal(x: Tensor, w: Tensor, start: Tensor, before: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_i w_i x_{t-W+1+i} over the taps that reach tokens of t's own document; the last tap is t itself.

    x (B, T, C), w (C, W), bias (C,), start (B, T) true where a document begins; before (B, W - 1, C) are the inputs
    before x, zero where they are of another document than the last. Returns y and what is `before` the next token.
    """
    T, W = x.shape[1], w.shape[1]
    if before.shape != (x.shape[0], W - 1, x.shape[2]) or start.shape != x.shape[:2]:
        raise ValueError(f"a convolution of {W} taps over {(*x.shape,)} does not go with a state {(*before.shape,)} "
                         f"and borders {(*start.shape,)}; a state is made by the begin() of the mixer that steps on it")
    doc = F.pad(start.cumsum(1), (W - 1, 0))                               # what came before goes on with document 0
    x = torch.cat([before.to(x.dtype), x], 1)
    taps = (x[:, i:i + T] * (doc[:, i:i + T] == doc[:, W - 1:]).unsqueeze(-1) * w[:, i] for i in range(W))
    y = sum(taps, 0 if bias is None else bias)
    return y, (x * (doc == doc[:, -1:]).unsqueeze(-1))[:, T:]  # pyright: ignore[reportReturnType]
