"""Recorded passes: what a machine without a GPU can say of them; tests/test_gpu.py records some."""
from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepladder.parallel import graph
from stepladder.parallel.watch import NAMES, Watch


class Tape(TorchDispatchMode):
    """Instead of a CUDA graph: what ran within is undone, and done again in the same memory by replay()."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.before += [(x, x.clone()) for x in tree_leaves(args[0])]
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for x, was in reversed(self.before):
            x.copy_(was)

    def replay(self) -> None:
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable and not func.is_view:
                out.copy_(again)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> graph.Captured:
    """A loss whose gradient is the sum of its inputs' rows; the watchdog is told of each pass that the host starts."""
    for name, new in (("Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None)),
                      ("stream", nullcontext), ("current_stream", lambda: None), ("synchronize", lambda: None),
                      ("CUDAGraph", Tape), ("graph", lambda graph, **kw: graph), ("graph_pool_handle", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, new)
    watch = Watch()
    watch.on, watch.complete, watch.held, watch.names = True, 0, deque(), [("", "")] * NAMES
    monkeypatch.setattr(graph, "watch", watch)
    w = nn.Parameter(torch.zeros(2))

    def run(inputs: Any) -> tuple[Tensor, ...]:
        watch.track(SimpleNamespace(is_completed=lambda: True), "all-reduce", "here")  # pyright: ignore
        loss = (w * inputs[0]).sum()
        loss.backward()
        return (loss.detach(),)
    return graph.Captured(run, [w], torch.device("cpu"))


SHAPES = [(1, True, 1.0), (3, False, 4.0), (1, False, 5.0), (3, True, 3.0), (2, False, 5.0)]    # rows, first, gradient


def test_recording_another_shape_leaves_alone_what_passes_before_it_made(captured: graph.Captured) -> None:
    (w,) = captured.params
    for rows, first, total in SHAPES:
        captured((torch.ones(rows, 2),), first)
        assert w.grad is not None
        assert w.grad.tolist() == [total, total]


def test_recordings_of_all_shapes_have_one_set_of_gradients(captured: graph.Captured) -> None:
    (w,), places = captured.params, set[int]()
    for rows, first, _ in SHAPES:
        captured((torch.ones(rows, 2),), first)
        assert w.grad is not None
        places.add(w.grad.data_ptr())
    assert len(captured.recorded) == 3
    assert len(places) == 1


def test_the_watchdog_does_not_count_what_one_rank_alone_does_to_record(captured: graph.Captured) -> None:
    graph.watch.note("all-gather")
    for rows, first, _ in SHAPES:
        captured((torch.ones(rows, 2),), first)
        assert (graph.watch.started, len(graph.watch.held)) == (1, 0)
        assert graph.watch.complete <= 1
