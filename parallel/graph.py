"""A micro-batch's pass as a CUDA graph: recorded once, then started with one call.

Forward and backward of a layer are some 70 kernels, and a host may take longer over their calls than tensor-parallel
GPUs over the work: 62 ms beside 58 for twelve layers of an 8B shape over two H200, with nothing left to hide under.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Inputs = tuple[Tensor | None, ...]         # a named one stays one


class Captured:
    """Replays `run`, which must not wait for the device; one recording for each set of input shapes."""

    def __init__(self, run: Callable[[Any], tuple[Tensor, ...]], params: list[nn.Parameter], device: torch.device):
        self.run, self.params = run, params
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.recorded: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, inputs: Inputs, first: bool) -> tuple[Tensor, ...]:
        """run(inputs); the parameters' gradients are set to this pass's, or if not `first` added to."""
        key = tuple(None if t is None else (t.shape, t.dtype) for t in inputs)
        if key not in self.recorded:
            kept = [p.grad for p in self.params]
            for p in self.params:            # recording runs passes, which must not add to what passes before made
                p.grad = None
            self.recorded[key] = _Recording(self, inputs)
            for p, grad in zip(self.params, kept, strict=True):
                p.grad = grad
        return self.recorded[key].replay(inputs, first)


class _Recording:
    def __init__(self, of: Captured, inputs: Inputs):
        self.params = of.params
        self.inputs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
        of.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(of.stream):
            for _ in range(3):               # compiles kernels, connects groups, finds sizes: none of it is recorded
                of.run(self.inputs)
        torch.cuda.synchronize()
        # A pass that leaves gradients behind, and one that adds to those of the pass before.
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.out: list[tuple[Tensor, ...]] = []
        for p in self.params:
            p.grad = None
        for graph in self.graphs:
            with torch.cuda.graph(graph, pool=of.pool, stream=of.stream, capture_error_mode="thread_local"):
                self.out.append(of.run(self.inputs))
        self.grads = [p.grad for p in self.params]

    def replay(self, inputs: Inputs, first: bool) -> tuple[Tensor, ...]:
        if not first and any(p.grad is not g for p, g in zip(self.params, self.grads, strict=True)):
            # The passes before had other shapes, and left their gradients elsewhere.
            for p, g in zip(self.params, self.grads, strict=True):
                if p.grad is not None and g is not None:
                    g.copy_(p.grad)
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self.graphs[not first].replay()
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        return tuple(t.clone() for t in self.out[not first])
