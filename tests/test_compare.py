"""launch/compare.py: what two runs differ in, where their losses part, and both curves in one picture."""
from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest

from stepladder.launch import cli, plot


def made(run: Path, losses: list[float], ranks: int = 1, seed: int = 0) -> Path:
    run.mkdir(parents=True)
    (run / "config.toml").write_text(f"[train]\nsteps = 9\nseed = {seed}\n\n[model]\nwidth = 8\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": i, "tokens": 100 * i, "loss": loss, "tokens_per_s": 50.0}) + "\n" for i, loss in enumerate(losses, 1)))
    (run / "events.jsonl").write_text("".join(json.dumps(
        {"time": 0.0, "event": event, "ranks": ranks, "torch": "2"}) + "\n" for event in ("start", "fault", "resume")))
    return run


def test_runs_of_one_name_are_told_apart_by_the_folders_that_hold_them(tmp_path, capsys):
    long = "learning-rate-and-nothing-else-was-changed-"
    runs = [made(tmp_path / path, [3.0]) for path in (f"{long}1/x/run", f"{long}2/x/run", "other")]
    assert cli.main(["compare", *map(str, runs)]) == 0
    assert capsys.readouterr().out.split("\n")[0].split() == [f"{long}1/x/run", f"{long}2/x/run", "other"]
    assert plot.names([runs[0], runs[2]]) == ["run", "other"]
    assert plot.names([runs[2], runs[2]]) == ["other", "other"]
    assert plot.names([Path("/b"), Path("/a/b")]) == ["/b", "a/b"]


def test_equal_runs_are_said_to_be_equal_bit_by_bit(tmp_path, capsys):
    a, b = (made(tmp_path / name, [3.0, 2.5, 2.0]) for name in "ab")
    assert cli.main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "losses are equal, bit by bit, at all 3 steps that they share" in out
    assert "no setting differs" in out
    assert matplotlib.image.imread(a / "compared.png")[..., :3].std() > 0.05


def test_the_step_at_which_losses_part_and_the_settings_that_differ_are_named(tmp_path, capsys):
    a, b = made(tmp_path / "a", [3.0, 2.5, 2.0, 1.5]), made(tmp_path / "b", [3.0, 2.5000001, 2.2], ranks=4, seed=7)
    assert cli.main(["compare", str(a), str(b), "--out", str(tmp_path / "x" / "y.png")]) == 0
    out = capsys.readouterr().out
    assert "losses are equal before step 2, and differ by 0.1 of themselves at most from there on" in out
    rows = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := line.split()) >= 3}
    assert rows["train.seed"] == ["0", "7"]
    assert rows["ranks"] == ["1", "4"]
    assert not {"torch", "model.width", "train.steps"} & rows.keys()
    assert rows["restarts"] == rows["faults"] == ["1", "1"]
    assert "loss at step 3     2.0000  2.2000" in out
    assert (tmp_path / "x" / "y.png").exists()


def test_what_a_run_was_trained_with_before_a_resume_is_told(tmp_path, capsys):
    a, b = (made(tmp_path / name, [3.0, 2.5, 2.0]) for name in "ab")
    with (a / "events.jsonl").open("a") as f:
        for step, changed in ((1, {"optimizer.warmup_steps": [20, 5]}), (3, {"optimizer.lr": [1, 2]})):
            print(json.dumps({"time": 1.0, "event": "resume", "step": step, "changed": changed}), file=f)
    assert cli.main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "\na: from step 2 on optimizer.warmup_steps 20 -> 5\n" in out
    assert "optimizer.lr" not in out                  # no step was made with it


def test_runs_that_differ_from_their_first_step_have_no_step_before_it(tmp_path, capsys):
    a, b = made(tmp_path / "a", [3.0, 2.5]), made(tmp_path / "b", [3.3, 2.5])
    assert cli.main(["compare", str(a), str(b)]) == 0
    assert "losses differ from step 1 on, by 0.1 of themselves at most" in capsys.readouterr().out


def test_each_of_several_runs_is_told_where_it_parts_from_the_first(tmp_path, capsys):
    given = {"a": [3.0, 2.5, 2.0], "b": [3.0, 2.5, 2.2], "c": [3.3], "d": [3.0, 2.5]}
    assert cli.main(["compare", *(str(made(tmp_path / name, losses)) for name, losses in given.items())]) == 0
    out = capsys.readouterr().out
    assert "b: losses are equal before step 3, and differ by 0.1 of themselves at most from there on" in out
    assert "c: losses differ from step 1 on, by 0.1 of themselves at most" in out
    assert "d: losses are equal, bit by bit, at all 2 steps that they share" in out


def test_a_torn_configuration_is_named(tmp_path, capsys):
    a, b = made(tmp_path / "a", [3.0]), made(tmp_path / "b", [3.0])
    (b / "config.toml").write_text("[train]\nsteps")
    assert cli.main(["compare", str(a), str(b)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"stepladder: {b}/config.toml is torn (")
    assert err.endswith("; a resume of the run writes it anew\n")


@pytest.mark.parametrize(("given", "sentence"), [
    (["a"], "a alone compares with nothing; name another run, or look at it with stepladder plot"),
    (["a", "nowhere"], "nowhere has no metrics.jsonl; name the folder of a run that has trained"),
])
def test_what_cannot_be_compared_is_said(tmp_path, capsys, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    made(Path("a"), [3.0])
    assert cli.main(["compare", *given]) == 2
    assert capsys.readouterr().err == f"stepladder: {sentence}\n"
