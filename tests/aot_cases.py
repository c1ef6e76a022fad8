"""The launches of every shape that a kernel family ships for; tests/aot.py compiles them. A family is a function."""
from __future__ import annotations

import torch

from stepladder.kernels import conv as conv_kernels
from stepladder.kernels import norm as norm_kernels

BF16 = torch.bfloat16


def conv() -> None:
    """Gated delta of 16 heads of 128, and Mamba-2's channels, which have a bias and are not normed."""
    for C, unit, head, bias in ((6144, 4096, 128, None), (4352, 0, 1, torch.empty(4352))):
        x, before, start = torch.empty(2, 256, C, dtype=BF16), torch.empty(2, 3, C, dtype=BF16), torch.zeros(2, 256)
        args = x, torch.empty(C, 4), bias, start.bool(), before, unit, head, 1e-6
        conv_kernels.forward(*args)
        conv_kernels.backward(*args, x, before)


def norm() -> None:
    """fp32 is what the torch forms hand over."""
    for dtype in (BF16, torch.float32):
        y, gate = (torch.empty(2, 256, 16, 128, dtype=d) for d in (dtype, BF16))
        scale = torch.empty(128)
        norm_kernels.forward(y, scale, gate, 1e-6)
        norm_kernels.backward(y, scale, gate, 1e-6, gate)
