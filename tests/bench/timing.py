"""How long a call takes on a device, and how much memory it needs there. On a CPU for dry runs alone."""
from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def other() -> torch.Tensor:
    return torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def milliseconds(f: Callable[[], Any], cuda: bool = True, ahead: int = 12) -> float:
    """Of f, with a cold cache: `ahead` thirds of a millisecond of other work before it let the host run ahead."""
    if not cuda:
        began = time.perf_counter()
        f()
        return (time.perf_counter() - began) * 1e3
    for _ in range(ahead):
        other().zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak(f: Callable[[], Any], cuda: bool = True) -> float:
    """Bytes above what is there already; 0 on a CPU."""
    if not cuda:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
