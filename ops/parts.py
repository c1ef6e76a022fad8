"""The sum of what several ranks hold of one tensor."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stepladder.ops.kernels import runs
from stepladder.ops.linear import promote

try:
    from stepladder.kernels import parts as kernels
except ModuleNotFoundError:     # without triton, which comes with torch for CUDA, the torch form runs
    kernels: Any = None


def add(parts: Sequence[Tensor], *outs: Tensor) -> None:
    """Each of outs = the sum of parts, in fp32 or wider and in their order: the same bits wherever it is formed.

    All are contiguous, of one size and type; no out is a part. Parts may lie in the memory of other GPUs.
    """
    if runs("parts", parts[0], parts[0].dtype):
        kernels.add(parts, outs)
        return
    total = promote(parts[0])
    for part in parts[1:]:
        total = total + part
    for out in outs:
        out.copy_(total.view_as(out))
