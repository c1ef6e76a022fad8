"""stepladder status says where a run stands."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepladder.launch import cli, status
from stepladder.parallel.checkpoint_folder import FORMAT, write_index


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps, of 1000 tokens now and 900 until step 40, at 500 tokens a second; it was restarted once."""
    (tmp_path / "config.toml").write_text("[train]\nsteps = 100\n[data]\nbatch_tokens = 1000\n")
    lines = [json.dumps({"step": s, "tokens": 900 * s, "loss": 5 - s / 100, "tokens_per_s": 500.0, "long": "x" * 3000})
             for s in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    for step in (10, 40):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoints/step-00000041.tmp-abcd").mkdir()
    (tmp_path / "unfinished").write_text("cut off\n")
    event(tmp_path, event="start", time=0, ranks=8, launcher="torchrun")
    event(tmp_path, event="fault", time=3600, error="rank 0 lost the others")
    event(tmp_path, event="resume", time=3700, ranks=16, launcher="Slurm")
    return tmp_path


def checkpoint(run: Path, step: int) -> Path:
    """Of four bytes."""
    path = run / f"checkpoints/step-{step:08d}"
    path.mkdir(parents=True)
    (path / "rank-00000.bin").write_bytes(b"1234")
    write_index(path, {"format": FORMAT, "files": {"rank-00000.bin": [4, "9be3e0a3"]}})
    return path


def event(run: Path, **facts: object) -> None:
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\n")


def test_status_says_where_a_run_stands(run: Path):
    said = status.said(run, now=3600 * 4)
    assert said["run"] == f"{run}: running, or cut off"
    assert said["step"].startswith("40 of 100, ")
    assert (said["tokens"], said["loss"]) == ("36,000", "4.6000")
    assert (said["speed"], said["left"]) == ("500 tokens/s", "2.0 minutes")
    assert said["started"] == "3.0 hours ago, on 16 ranks told by Slurm"
    assert (said["restarts"], said["checkpoint"]) == ("1", "step-00000040")
    assert said["last error"] == "rank 0 lost the others (3.0 hours ago, 1 start since)"
    event(run, event="resume", time=3800, ranks=16, launcher="Slurm")
    assert status.said(run, now=3600 * 4)["last error"].endswith("(3.0 hours ago, 2 starts since)")
    event(run, event="unsaved", time=3900, error="no room")
    assert status.said(run, now=3960)["last error"] == "no room (60 seconds ago)"


def test_speed_and_time_left_are_those_since_the_last_start(run: Path):
    with open(run / "metrics.jsonl", "a") as file:
        for step, mesh in ((41, {"mesh": "Mesh(1 cpu)"}), (42, {})):
            file.write("\n" + json.dumps({"step": step, "tokens": 900 * step, "tokens_per_s": 50.0} | mesh))
        file.write("\n")
    assert status.said(run, 0.0)["speed"] == "50 tokens/s"


def test_the_last_checkpoint_is_the_newest_whole_one_and_torn_ones_are_named(run: Path):
    short, empty = checkpoint(run, 50), run / "checkpoints/step-00000060"
    (short / "rank-00000.bin").write_bytes(b"12")
    empty.mkdir()
    torn = (f"; not step-00000060: {empty / 'checkpoint.json'} is missing; {empty} is not a checkpoint"
            f"; not step-00000050: {short / 'rank-00000.bin'} has 2 bytes instead of 4")
    assert status.said(run, now=0)["checkpoint"] == "step-00000040" + torn
    for step in (10, 40):
        (run / f"checkpoints/step-{step:08d}/rank-00000.bin").unlink()
    said = status.said(run, now=0)["checkpoint"]
    assert said.startswith("none" + torn)
    assert said.endswith("; not step-00000010: " + f"{run / 'checkpoints/step-00000010/rank-00000.bin'} is missing")


@pytest.mark.parametrize(("last", "step", "marker", "state"), [
    ("end", 40, "stopped by SIGUSR1 at step 40", "stopped by SIGUSR1 at step 40"), ("end", 100, "", "finished"),
    ("end", 40, "", "stopped at step 40, as --steps-now said"),
    ("fault", 40, "cut off", "failed; another start may mend it"), ("fault", 40, "", "failed")])
def test_the_state_is_the_last_word_of_the_run(run: Path, last: str, step: int, marker: str, state: str):
    event(run, event=last, time=3800, step=step, error="x")
    event(run, event="skip", time=3801, step=step, shard="told by another rank, that is later")
    (run / "unfinished").write_text(marker) if marker else (run / "unfinished").unlink()
    assert status.said(run, now=3900)["run"] == f"{run}: {state}"


def test_a_run_that_has_made_no_step_has_a_status(run: Path):
    for name in ("metrics.jsonl", "events.jsonl", "unfinished"):
        (run / name).unlink()
    said = status.said(run, now=0)
    assert (said["run"], said["step"], said["restarts"]) == (f"{run}: not begun", "0 of 100", "0")


def test_a_configuration_that_was_not_written_to_its_end_is_refused(run: Path, capsys):
    for text in ("", "[train"):
        (run / "config.toml").write_text(text)
        assert cli.main(["status", str(run)]) == 2
        assert f"{run / 'config.toml'} holds no run's configuration (" in capsys.readouterr().err


def test_the_status_of_no_run_is_refused(tmp_path: Path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run: it has no config.toml" in capsys.readouterr().err
