"""What tests of kernels share: memory that shows what nobody wrote, errors, launches compiled for a Hopper GPU."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
BAR = {SINGLE: 1e-5, HALF: 5e-3}        # RMS ratio under the interpreter, which adds up in fp32
AOT = Path(__file__).with_name("aot.py")


@contextmanager
def poison() -> Iterator[None]:
    """New memory is NaN (integers: the largest): an element that no kernel writes shows."""
    settings: Any = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)        # fp64 references sum up in ways CUDA warns of
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    settings.fill_uninitialized_memory = before


@pytest.fixture
def poisoned() -> Iterator[None]:
    with poison():
        yield


def ratio(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of what is right; NaN where either is."""
    error, size = (x.detach().double().square().mean().sqrt() for x in (got.double() - want.double(), want))
    return float(error / size.clamp_min(1e-6))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def outcome(f: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of f(**inputs) as "y" and "S", and the gradients "dq", ... of a random linear function of all of them."""
    inputs = {n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    out = f(**inputs)
    loss = sum((z * randn(*z.shape, seed=100 + i).to(z)).sum() for i, z in enumerate(out))
    wrt = {n: x for n, x in inputs.items() if x.is_floating_point()}
    grads = torch.autograd.grad(loss, [*wrt.values()])              # pyright: ignore[reportArgumentType]
    for (n, x), dx in zip(wrt.items(), grads, strict=True):
        assert (dx.shape, dx.dtype) == (x.shape, x.dtype), n
    return dict(zip(("y", "S"), out, strict=False)) | {f"d{n}": dx for n, dx in zip(wrt, grads, strict=True)}


def errors(fast: Callable[..., Any], definition: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, float]:
    """RMS ratios of fast(**inputs), outputs and every gradient, against the definition in fp64 on the same inputs."""
    got = outcome(fast, inputs)
    want = outcome(definition, {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
    return {n: ratio(got[n], want[n]) for n in want}


def agree(fast: Callable[..., Any], definition: Callable[..., Any], inputs: dict[str, Tensor], bar: float,
          **bars: float) -> None:
    """Every output and gradient is within its bar, or `bar`."""
    found = errors(fast, definition, inputs)
    bad = {n: f"{e:.1e}" for n, e in found.items() if not e < bars.get(n, bar)}
    assert not bad, f"beyond {bars or ''} {bar}: {bad}"


_compiler = ThreadPoolExecutor(1)


@cache
def compiling(family: str) -> Future[list[dict[str, Any]]]:
    """Begins to compile a family's cases, beside tests that interpret and leave the second core idle."""
    return _compiler.submit(_compile, family)


def _compile(family: str) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": folder}
        done = subprocess.run([sys.executable, AOT, family], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled(family: str) -> list[dict[str, Any]]:
    """What tests/aot.py says of each launch in the family's cases, which compilers must get right; in a process that
    does not interpret."""
    found = compiling(family).result(240)
    assert not (wrong := [one for one in found if one["hazards"]]), wrong
    return found
