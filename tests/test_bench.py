"""Measurements that a GPU is for run on a CPU, with a toy: their numbers mean nothing there."""
from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest


@pytest.mark.parametrize(("script", "rows"), [("layers", ("2x64", "1x100")), ("lengths", ("32", "64"))])
@pytest.mark.filterwarnings("ignore:Data has no positive values")
def test_a_measurement_of_layers_runs_small_on_a_cpu(
        script: str, rows: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["", "--small", "--device", "cpu", "--layers", "attention"])
    import_module(script).main()
    out = capsys.readouterr().out
    assert all(f" {row} |" in out for row in rows)
    assert (tmp_path / "lengths.png").exists() == (script == "lengths")
