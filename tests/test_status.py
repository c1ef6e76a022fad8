"""stepladder status says where a run stands; stepladder slurm fills its job in and refuses what could not run."""
from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from stepladder.launch import cli, slurm, status

EXAMPLE = slurm.ROOT / "examples" / "hybrid-100m.toml"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps of 1000 tokens at 500 tokens a second; it was restarted once and is at step 40."""
    (tmp_path / "config.toml").write_text("[train]\nsteps = 100\n[data]\nbatch_tokens = 1000\n")
    lines = [json.dumps({"step": s, "loss": 5 - s / 100, "tokens_per_s": 500.0, "long": "x" * 3000})
             for s in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    for step in (10, 40):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000041.tmp-abcd").mkdir()
    (tmp_path / "unfinished").write_text("cut off\n")
    event(tmp_path, event="start", time=0, ranks=8, launcher="torchrun")
    event(tmp_path, event="fault", time=3600, error="rank 0 lost the others")
    event(tmp_path, event="resume", time=3700, ranks=16, launcher="Slurm")
    return tmp_path


def event(run: Path, **facts: object) -> None:
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\n")


def test_status_says_where_a_run_stands(run: Path):
    said = status.said(run, now=3600 * 4)
    assert said["run"] == f"{run}: running, or cut off"
    assert said["step"].startswith("40 of 100, ")
    assert (said["tokens"], said["loss"]) == ("40,000", "4.6000")
    assert (said["speed"], said["left"]) == ("500 tokens/s", "2.0 minutes")
    assert said["started"] == "3.0 hours ago, on 16 ranks told by Slurm"
    assert (said["restarts"], said["checkpoint"]) == ("1", "step-00000040")
    assert said["last error"] == "rank 0 lost the others (3.0 hours ago)"


@pytest.mark.parametrize(("last", "marker", "state"), [
    ("end", "stopped by SIGUSR1 at step 40", "stopped by SIGUSR1 at step 40"), ("end", "", "finished"),
    ("fault", "cut off", "failed; another start may mend it"), ("fault", "", "failed")])
def test_the_state_is_the_last_word_of_the_run(run: Path, last: str, marker: str, state: str):
    event(run, event=last, time=3800, step=40, error="x")
    (run / "unfinished").write_text(marker) if marker else (run / "unfinished").unlink()
    assert status.said(run, now=3900)["run"] == f"{run}: {state}"


def test_a_run_that_has_made_no_step_has_a_status(run: Path):
    for name in ("metrics.jsonl", "events.jsonl", "unfinished"):
        (run / name).unlink()
    said = status.said(run, now=0)
    assert (said["run"], said["step"], said["restarts"]) == (f"{run}: not begun", "0 of 100", "0")


def test_the_status_of_no_run_is_refused(tmp_path: Path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run: it has no config.toml" in capsys.readouterr().err


def test_a_filled_job_is_the_script_with_other_values(capsys, tmp_path: Path):
    folder = tmp_path / "first $HOME"
    assert cli.main(["slurm", str(EXAMPLE), "--nodes", "2", "--per-node", "2", "--time", "1:00:00", "--account", "ours",
                     "--start", "srun", "--folder", str(folder), "train.steps=700", "optimizer.lr=1e-3"]) == 0
    job = capsys.readouterr().out
    want = {"job-name": "hybrid-100m", "nodes": "2", "gpus-per-node": "2", "time": "1:00:00", "account": "ours"}
    assert want.items() <= dict(line[10:].split()[0].split("=") for line in job.splitlines()
                                if line.startswith("#SBATCH --") and line.count("=") == 1).items()
    assert "\n##SBATCH --partition=" in job
    top = job[job.index("RUN="):job.index("restarts=")]
    told = subprocess.run(["bash", "-c", top + 'printf "%s\\n" "$RUN" "$FOLDER" "$PER_NODE" "$START" "${ARGS[@]}"'],
                          capture_output=True, text=True).stdout.splitlines()
    assert told == [str(EXAMPLE), str(folder), "2", "srun", "train.steps=700", "optimizer.lr=1e-3"]
    changed = set(job.splitlines()) - set(slurm.TEMPLATE.read_text().splitlines())
    assert len(changed) == 12                               # and nothing else


def test_what_cannot_run_on_so_many_ranks_is_refused_before_the_queue(capsys):
    assert cli.main(["slurm", str(EXAMPLE), "parallel.tp=3", "--nodes", "1"]) == 2
    assert "the number of processes = 8 is not divisible by parallel.tp x parallel.pp = 3" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "fit"), [([], "2 4"), (["data.lanes=96", "data.batch_tokens=393216"], "")])
def test_a_job_of_as_many_nodes_as_there_are_knows_which_numbers_the_batch_can_be_dealt_to(capsys, tmp_path: Path,
                                                                                         more: list[str], fit: str):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "excluded").write_text("n7 its disk is full (job 3)\nn2 silent\nn7 silent\n")
    flags = ["--nodes", "2-4", "--per-node", "1", "--folder", str(tmp_path)]
    assert cli.main(["slurm", str(EXAMPLE), *flags, *more]) == 0
    job = capsys.readouterr().out
    assert "\n#SBATCH --nodes=2-4 " in job
    assert f"\nFIT=({fit}) " in job
    assert "\n#SBATCH --exclude=n2,n7\n" in job                # what an earlier job found unfit
    assert cli.main(["slurm", str(EXAMPLE), *flags, *more, "--nodes", "3-4"]) == (2 if fit else 0)
    assert ("as it is, it runs on dp = 1, 2, 4" in capsys.readouterr().err) is bool(fit)


def test_submitting_where_there_is_no_slurm_leaves_the_script(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["slurm", str(EXAMPLE), "--folder", str(tmp_path / "run"), "--submit", "--per-node", "4"]) == 2
    assert f"sbatch is not on this machine; submit {tmp_path}/run/slurm/train.sbatch on" in capsys.readouterr().err
    assert "\nFOLDER=" in (tmp_path / "run/slurm/train.sbatch").read_text()


@pytest.mark.parametrize("script", sorted((slurm.ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_every_job_is_bash_with_its_options_on_top(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith(("#SBATCH", "##SBATCH"))]
    assert all(line.startswith("#") for line in lines[:options[-1]])       # Slurm reads none after the first command
