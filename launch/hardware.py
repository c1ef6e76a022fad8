"""What a run says of its device: its name, what it could do, and the memory it took."""
from __future__ import annotations

import resource

import torch

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}      # dense bf16 FLOP/s of the datasheets


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak(device: torch.device) -> float:
    """FLOP/s; 0 where no datasheet is known."""
    return next((flops for key, flops in PEAK.items() if key in name(device)), 0.0)


def memory(device: torch.device) -> float:
    """The most that was taken so far, in GiB."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss
    return used / 2**30
