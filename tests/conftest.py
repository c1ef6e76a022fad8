"""Where there is no GPU, triton interprets kernels; it reads this once, when kernels are imported.
Ranks are forked from a server that has imported the files of their tests.
"""
from __future__ import annotations

import os
from importlib import import_module

import pytest
import ranks
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two files at a time: jobs that wait for Slurm go beside all others, and what fills every core comes last."""
    when = {"test_slurm": 0, "test_parity": 2}
    items.sort(key=lambda item: when.get(item.path.stem, 1))


def pytest_collection_finish(session: pytest.Session) -> None:
    files = {item.module for item in session.items if isinstance(item, pytest.Function)}
    ranks.preload(*sorted(file.__name__ for file in files if "ranks" in vars(file)))


@pytest.fixture(scope="module", autouse=True)
def compiled_beside(request: pytest.FixtureRequest) -> None:
    """tests/test_kernels_<family>.py: its launches are compiled while its first tests run."""
    _, found, family = request.module.__name__.partition("test_kernels_")
    if found and not GPU:
        import_module("fused").compiling(family)
