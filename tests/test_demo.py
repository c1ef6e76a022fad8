"""The demo in small: it runs to its end, shows what it claims, and says so in a sentence where it cannot."""
from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from stepladder.launch import cli, config, demo, rules
from stepladder.model.decoder import parameters

EXAMPLES = demo.EXAMPLES
TINY = """
[model]
vocab = 300
width = 16
layers = 2
pattern = ["gla", "full"]
[model.blocks.gla]
token = { kind = "gla", heads = 2, key_dim = 8, value_dim = 8 }
channel = { kind = "moe", experts = 4, top_k = 2, hidden = 16 }
lag = [1, 1]
[model.blocks.full]
token = { kind = "attention", heads = 2, head_dim = 8 }
channel = { kind = "swiglu", hidden = 16 }
lag = [1, 1]
[data]
seq = 16
batch_tokens = 64
rows = 4
lanes = 4
[data.sources.plays]
shards = "elsewhere"
[train]
steps = 240
log_every = 50
dtype = "fp32"
[optimizer]
lr = 1e-2
[checkpoint]
every = 100
background = false
"""


def corpus(folder: Path) -> Path:
    path = folder / "plays.txt"
    path.write_text("ROMEO\nBut soft, what light through yonder window breaks?\nIt is the east.\n\n" * 300)
    return path


def test_the_demo_kills_resumes_splits_and_samples(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    settings = tmp_path / "tiny.toml"
    settings.write_text(TINY)
    demo.walk(tmp_path / "out", settings, corpus(tmp_path))
    said = capfd.readouterr().out
    assert "steps 101-" in said
    assert "losses and gradient norms are bitwise equal" in said
    assert "they differ by" in said
    assert "ROMEO" in said.split("=== 6")[1]
    for made in ("curves.png", "run/tensorboard", "run/config.toml", "run/checkpoints/step-00000240"):
        assert (tmp_path / "out" / made).exists(), made
    assert len(demo._records(tmp_path / "out/run")) == 240


def record(loss: float | None, **more: Any) -> dict[str, Any]:
    return {"loss": loss, "grad_norm": 1.0, **more}


def test_a_resume_that_differs_in_one_bit_is_not_called_exact():
    killed = {1: record(3.0), 2: record(2.0), 3: record(1.5)}
    resumed = {1: record(3.0), 2: record(2.0, resumed=True), 3: record(1.5)}
    assert "steps 2-3" in demo.same_bits(killed, resumed)
    for other in (record(1.5 + 2**-52), record(None), record(1.5) | {"grad_norm": 2.0}):
        with pytest.raises(demo.DemoError, match=r"step 3 had .* the resume is not exact"):
            demo.same_bits(killed, {**resumed, 3: other})
    with pytest.raises(demo.DemoError, match="no step was computed twice"):
        demo.same_bits({1: record(3.0)}, resumed)
    with pytest.raises(demo.DemoError, match="no step was computed twice"):
        demo.same_bits(killed, {1: record(3.0), 2: record(2.0)})


def test_four_processes_may_differ_by_rounding_only():
    one = {1: record(3.0), 2: record(2.0), 3: record(1.5)}
    assert "1e-05 at most" in demo.same_but_rounding({2: record(2.0), 3: record(1.50001)}, one)
    for four in ({3: record(1.51)}, {2: record(2.0), 3: record(None)}, {}):
        with pytest.raises(demo.DemoError, match="more than rounding"):
            demo.same_but_rounding(four, one)


def test_only_a_folder_that_the_demo_made_is_emptied(tmp_path: Path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="name another folder with --out"):
        demo._clear(tmp_path)
    assert (tmp_path / "mine").exists()
    demo._clear(tmp_path / "new")
    (tmp_path / "new/left").touch()
    demo._clear(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [demo.MADE_HERE]


def test_a_training_that_ends_before_the_kill_is_said(tmp_path: Path):
    with pytest.raises(demo.DemoError, match="exit code 3 before step 5"):
        demo._train_until(5, tmp_path, [sys.executable, "-c", "raise SystemExit(3)"])


def test_without_its_examples_the_demo_says_where_to_run_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "run the demo from a checkout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_example_runs_are_sound_and_of_the_size_in_their_name(path: Path):
    run = config.load(path)
    rules.check(run, 1)
    if size := re.search(r"-(\d+)([mb])$", path.stem):
        named = int(size[1]) * {"m": 1e6, "b": 1e9}[size[2]]
        assert named <= parameters(run.model)[0] < 1.5 * named


def test_the_demo_run_fits_its_four_processes():
    rows = config.load(EXAMPLES / "demo.toml").data.rows // 2
    rules.check(config.load(EXAMPLES / "demo.toml", ["parallel.tp=2", "parallel.pp=2", f"data.rows={rows}"]), 4)
