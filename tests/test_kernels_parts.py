"""Sums of what several ranks hold: the kernel and the torch form make the same bits."""
from __future__ import annotations

import pytest
import torch
from fused import HALF, SINGLE, randn
from torch import Tensor

from stepladder.kernels import parts as kernels
from stepladder.ops import parts


def both(n: int, size: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel wrote to two places, and the sum in fp32."""
    every = [randn(size, seed=r).to(device, dtype) for r in range(n)]
    first, second = (torch.full((size,), torch.nan, dtype=dtype, device=device) for _ in range(2))
    kernels.add(every, (first, second))
    want = torch.zeros(size, device=device)
    for part in every:
        want = want + part
    return first, second, want.to(dtype)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("n", "size"), [(2, 1), (3, 1000), (4, 4096)])
def test_parts_are_added_in_their_order_and_rounded_once(n: int, size: int, dtype: torch.dtype,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 512)            # several rounds of several programs, the last ones not full
    monkeypatch.setattr(kernels, "processors", lambda x: 3)
    first, second, want = both(n, size, dtype)
    assert torch.equal(first, want)
    assert torch.equal(second, want)


def test_the_torch_form_makes_the_same_bits_and_keeps_double_precision() -> None:
    every = [randn(2, 50, seed=r).to(HALF) for r in range(3)]
    out = torch.empty_like(every[0])
    parts.add(every, out)
    assert torch.equal(out, (every[0].float() + every[1] + every[2]).to(HALF))
    wide = [randn(50, seed=r).double() for r in range(3)]
    total = torch.empty(50, dtype=torch.float64)
    parts.add(wide, total)
    assert torch.equal(total, wide[0] + wide[1] + wide[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE])
@pytest.mark.parametrize("size", [1, 12_345, 2**22])
def test_on_a_gpu_parts_are_added_in_their_order_and_rounded_once(size: int, dtype: torch.dtype) -> None:
    first, second, want = both(4, size, dtype, "cuda")
    assert torch.equal(first, want)
    assert torch.equal(second, want)
