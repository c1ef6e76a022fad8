"""Recorded passes: what a machine without a GPU can say of them; tests/test_gpu.py records some."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepladder.parallel import graph


class Recording:
    """Warms up as a recording does; a replay is one more pass."""

    def __init__(self, of: graph.Captured, inputs: Any):
        self.of = of
        for _ in range(3):
            of.run(inputs)

    def replay(self, inputs: Any, first: bool) -> tuple[Tensor, ...]:
        for p in self.of.params:
            p.grad = None if first else p.grad
        return self.of.run(inputs)


def test_recording_another_shape_leaves_alone_what_passes_before_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graph, "_Recording", Recording)
    w = nn.Parameter(torch.zeros(2))

    def run(inputs: Any) -> tuple[Tensor, ...]:
        loss = (w * inputs[0]).sum()
        loss.backward()
        return (loss,)

    captured = graph.Captured(run, [w], torch.device("cpu"))
    for rows, first, total in ((1, True, 1.0), (3, False, 4.0), (1, False, 5.0), (3, True, 3.0)):
        captured((torch.ones(rows, 2),), first)
        assert w.grad is not None
        assert w.grad.tolist() == [total, total]
