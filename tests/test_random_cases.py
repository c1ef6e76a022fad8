"""tests/random_cases.py finds what is wrong, and nothing else."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import random_cases
import torch
from fused import HALF, SINGLE
from random_cases import Build, Case, Draw, judge
from torch import Tensor

from stepladder.ops import norm

CASE = next(i for i, build in enumerate(random_cases.spread()) if build.family == "norm")     # quick to interpret


def run(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["", "--case", str(CASE)])
    return random_cases.main()


def test_kernels_that_are_right_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    assert "1 of 1 cases, 0 failures" in capsys.readouterr().out


def test_a_wrong_kernel_is_found_and_a_line_names_the_case(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fused = norm.fused
    monkeypatch.setattr(norm, "fused", lambda *args: fused(*args) * 1.001)
    assert run(monkeypatch) == 1
    out = capsys.readouterr().out
    assert f"--case {CASE}: norm: y 1.0e-03" in out
    assert "1 of 1 cases, 1 failures" in out


def test_what_raises_leaves_out_the_rest_of_its_build(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(d: Draw, dtype: torch.dtype) -> Case:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(random_cases.FAMILIES, "toy", broken)
    ((case, result),) = random_cases.work((Build("toy", HALF, {}), [3, 4]), 0, 1e12)
    assert case == 3
    assert result.wrong.startswith("RuntimeError: an illegal memory access; float16")


@pytest.mark.parametrize(("error", "passes"), [(0.5, True), (8.0, False)])
def test_the_bar_of_a_difference_is_raised_by_what_rounding_does_to_it(
        error: float, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def difference(error: float) -> Callable[..., Any]:
        return lambda x, y: (x * (1 + error * torch.finfo(HALF).eps) - y,)

    def toy(d: Draw, dtype: torch.dtype) -> Case:
        y = torch.ones(500, dtype=dtype)
        x: dict[str, Tensor] = {"x": y * (1 + 4 * torch.finfo(dtype).eps), "y": y}
        return Case(x, lambda x, y: difference(error)(x.double(), y.double()), difference(0))

    monkeypatch.setitem(random_cases.FAMILIES, "toy", toy)
    monkeypatch.setitem(random_cases.BARS, "toy", {"": 5e-3})
    result = judge(Build("toy", HALF, {}), 0, 0, "cpu")
    assert result.worst > 1
    assert result.raised
    assert (not result.wrong) == passes


@pytest.mark.parametrize(("draws", "passes"), [([1, 1, 9], True), ([1, 1, 1, 1, 9], False)])
def test_it_is_raised_by_the_most_that_a_few_roundings_do(
        draws: list[float], passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    off, unit = iter(draws), torch.finfo(HALF).eps / 2
    monkeypatch.setitem(random_cases.FAMILIES, "toy", lambda d, dtype: Case(
        {"x": torch.ones(5, dtype=dtype)}, lambda x: (x.double() + 0.02,), lambda x: (x,)))
    monkeypatch.setitem(random_cases.BARS, "toy", {"": 5e-3})
    monkeypatch.setattr(random_cases, "rounded", lambda x, dtype, d: {"x": x["x"].double() * (1 + next(off) * unit)})
    assert (not judge(Build("toy", HALF, {}), 0, 0, "cpu").wrong) == passes


def test_the_bar_is_that_of_the_coarsest_type_among_inputs() -> None:
    builds = [random_cases.Build("norm", SINGLE, {"V": 16, "gate": gate}) for gate in (HALF, SINGLE)]
    mixed, single = (judge(build, 0, CASE, "cpu") for build in builds)
    assert not mixed.wrong
    assert not single.wrong
    assert mixed.worst < 1      # of a bar for 16 bits: the result and what is sent back to it are of the gate's type
