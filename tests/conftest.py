"""Where there is no GPU, triton interprets kernels; it reads this once, when kernels are imported."""
from __future__ import annotations

import os
from importlib import import_module

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def compiled_beside(request: pytest.FixtureRequest) -> None:
    """tests/test_kernels_<family>.py: its launches are compiled while its first tests run."""
    _, found, family = request.module.__name__.partition("test_kernels_")
    if found and not GPU:
        import_module("fused").compiling(family)
