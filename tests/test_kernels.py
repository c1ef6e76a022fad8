"""ops/kernels.py: a kernel runs on CUDA, once it was seen to, where nothing speaks against it; a line says why not."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepladder.ops import kernels

HALF = torch.float16


def tokens(n: int = 6, cuda: bool = True) -> Any:
    """As much of a tensor as is asked for, on a device that need not be there."""
    return SimpleNamespace(is_cuda=cuda, numel=lambda: n)


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "SEEN", frozenset({"gla"}))
    kernels.say.cache_clear()
    yield
    kernels.say.cache_clear()


def test_a_family_runs_once_it_has_been_seen_to_and_on_cuda_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert kernels.runs("gla", tokens(), HALF, None, None)
    assert not kernels.runs("gla", tokens(cuda=False), HALF)
    assert not kernels.runs("delta", tokens(), HALF)
    assert caplog.text == ""


@pytest.mark.parametrize(("n", "dtype", "reasons", "triton", "said"), [
    (6, HALF, (None, "keys of 12", "values of 7"), True, "keys of 12"),
    (6, torch.float64, ("keys of 12",), True, "torch.float64"),
    (0, HALF, (), True, "no tokens"),
    (6, HALF, (), False, "a machine without triton"),
])
def test_what_no_kernel_covers_is_said_once(n, dtype, reasons, triton, said, monkeypatch, caplog) -> None:
    monkeypatch.setattr(kernels, "TRITON", triton)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not kernels.runs("gla", tokens(n), dtype, *reasons)
    assert [r.message for r in caplog.records] == [f"gla: no kernel for {said}; running the torch form"]
