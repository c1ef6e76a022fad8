"""Measurements that a GPU is for run on a CPU, with a toy: their numbers mean nothing there."""
from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

BENCH, EXAMPLES = Path(__file__).parent / "bench", Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("script", "rows"), [("layers", ("2x64", "1x100")), ("lengths", ("32", "64"))])
@pytest.mark.filterwarnings("ignore:Data has no positive values")
def test_a_measurement_of_layers_runs_small_on_a_cpu(
        script: str, rows: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["", "--small", "--device", "cpu", "--layers", "attention"])
    import_module(script).main()
    out = capsys.readouterr().out
    assert all(f" {row} |" in out for row in rows)
    assert (tmp_path / "lengths.png").exists() == (script == "lengths")


def test_a_measurement_of_restarts_says_which_batch_would_do_before_torchrun_starts(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCH)
    restarts = import_module("restarts")
    monkeypatch.setattr(restarts.subprocess, "Popen", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.setattr("sys.argv", ["restarts.py", str(EXAMPLES / "demo.toml"), "--ranks", "4"])
    with pytest.raises(SystemExit, match="2"):
        restarts.main()
    assert "data.seq x data.rows x dp = 256 x 8 x 4 = 8192; set it to 8192, or" in capsys.readouterr().err
