"""Whether a kernel runs; where it does not, the torch form does, and one line says why."""
from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Families whose GPU tests have passed on a GPU. Others run only where a test or a bench calls them by name.
SEEN = frozenset({"conv", "delta", "gla", "norm", "parts", "rows", "scan", "ssd", "step"})
TRITON = find_spec("triton") is not None        # it comes with torch for CUDA, but not on every system


def runs(family: str, x: Tensor, dtype: torch.dtype, *reasons: str | None) -> bool:
    """Whether `family` computes with x, in dtype: on CUDA, where nothing speaks against it. A reason is words, or None.

    Traced models ask too, so reasons come from shapes and types, never from values.
    """
    if not x.is_cuda or family not in SEEN:
        return False
    common = (None if TRITON else "a machine without triton", None if x.numel() else "no tokens",
              None if dtype.itemsize < 8 else f"{dtype}")
    why = next(filter(None, (*common, *reasons)), None)
    if why and not torch.compiler.is_compiling():
        say(f"{family}: no kernel for {why}; running the torch form")
    return why is None


def unsound(dtype: torch.dtype) -> str | None:
    """A reason against kernels that are made of products. Of those in fp32 ptxas 12.8 forms addresses of operands from
    wrong registers, in some launches, which the interpreter of tests knows nothing of (tests/hazards.py)."""
    return None if dtype.itemsize == 2 else f"{dtype}, of which ptxas 12.8 makes wrong code"


@cache                          # once a process
def say(line: str) -> None:
    logging.getLogger(__name__).warning(line)
