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

from stepladder.parallel.watch import watch

Inputs = tuple[Tensor | None, ...]         # a named one stays one


class Captured:
    """Replays `run`, which must not wait for the device; one recording for each set of input shapes."""

    def __init__(self, run: Callable[[Any], tuple[Tensor, ...]], params: list[nn.Parameter], device: torch.device):
        self.run, self.params = run, params
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.recorded: dict[tuple[object, ...], _Recording] = {}
        # Where the first recording leaves its gradients, and all others too: a set each would fill the device in time.
        self.grads: list[Tensor | None] | None = None

    def __call__(self, inputs: Inputs, first: bool) -> tuple[Tensor, ...]:
        """run(inputs); the parameters' gradients are set to this pass's, or if not `first` added to."""
        key = tuple(None if t is None else (t.shape, t.dtype) for t in inputs)
        if key not in self.recorded:
            kept, started = [p.grad for p in self.params], watch.started
            for p in self.params:            # recording runs passes, which must not add to what passes before made
                p.grad = None
            self.recorded[key] = _Recording(self, inputs)
            for p, grad in zip(self.params, kept, strict=True):
                p.grad = grad
            watch.forget(started)            # ranks that have recorded this before do not count these passes
        return self.recorded[key].replay(inputs, first)


class _Recording:
    def __init__(self, of: Captured, inputs: Inputs):
        self.params, shared = of.params, of.grads
        self.inputs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
        of.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(of.stream):
            for _ in range(3):               # compiles kernels, connects groups, finds sizes: none of it is recorded
                of.run(self.inputs)
        torch.cuda.synchronize()
        # A pass that leaves gradients behind, and one that adds to those of the pass before.
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.out: list[tuple[Tensor, ...]] = []
        for p, grad in zip(self.params, shared or [None] * len(self.params), strict=True):
            p.grad = grad
        for graph in self.graphs:
            with torch.cuda.graph(graph, pool=of.pool, stream=of.stream, capture_error_mode="thread_local"):
                if shared is not None and not self.out:
                    torch._foreach_zero_([grad for grad in shared if grad is not None])
                self.out.append(of.run(self.inputs))
        self.grads = of.grads = [p.grad for p in self.params]

    def replay(self, inputs: Inputs, first: bool) -> tuple[Tensor, ...]:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self.graphs[not first].replay()
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        return tuple(t.clone() for t in self.out[not first])
