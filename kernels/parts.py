"""The sum of a few tensors, read once each and written to one place or two."""
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from stepladder.kernels.tiles import processors

BLOCK, WARPS = 16 * 32 * 16, 16         # bytes of a part that a program reads at once: 16 a thread


@triton.jit
def _add(parts, outs, numel, N: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr):
    for at in tl.range(tl.program_id(0) * BLOCK, numel, tl.num_programs(0) * BLOCK):
        i = at + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for n in tl.static_range(N):
            total += tl.load(parts[n] + i, mask=i < numel, other=0.0).to(tl.float32)
        for n in tl.static_range(OUTS):
            tl.store(outs[n] + i, total.to(outs[n].dtype.element_ty), mask=i < numel)


def add(parts: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Each of outs = the sum of parts, in fp32 and in their order. All contiguous, of one size and type."""
    block = BLOCK // parts[0].itemsize
    _add[(processors(parts[0]),)](tuple(parts), tuple(outs), parts[0].numel(), len(parts), len(outs), block,
                                  num_warps=WARPS)
