"""stepladder slurm fills slurm/train.sbatch in for a run, and refuses what can run nowhere. test_slurm.py runs jobs."""
from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepladder.launch import cli, slurm
from stepladder.parallel import zero

EXAMPLE = slurm.ROOT / "examples" / "hybrid-100m.toml"       # 128 rows of 1024 tokens from 32 lanes, by 32 at once
ON_8 = "data.rows=4"                                         # or less, for 8 processes a node on up to 4 nodes


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """`stepladder slurm EXAMPLE ARGS`: the job, or with `code` 2 the sentence."""
    def call(*args: str, code: int = 0) -> str:
        assert cli.main(["slurm", str(EXAMPLE), "--folder", str(tmp_path / "run"), *args]) == code
        out, err = capsys.readouterr()
        assert (out == "", err == "") == (code == 2, code == 0)
        assert err.count("\n") == (code == 2)
        return out + err.removeprefix("stepladder: ")
    return call


def test_a_filled_job_is_the_script_with_other_values(capsys, tmp_path: Path):
    folder = tmp_path / "first $HOME"
    assert cli.main(["slurm", str(EXAMPLE), "--nodes", "2", "--per-node", "2", "--time", "1:00:00", "--account", "ours",
                     "--start", "srun", "--folder", str(folder), "train.steps=700", "optimizer.lr=1e-3"]) == 0
    job = capsys.readouterr().out
    want = {"job-name": "hybrid-100m", "nodes": "2", "gpus-per-node": "2", "time": "1:00:00", "account": "ours",
            "chdir": str(Path.cwd())}
    assert want.items() <= dict(line[10:].split()[0].split("=") for line in job.splitlines()
                                if line.startswith("#SBATCH --") and line.count("=") == 1).items()
    assert "\n##SBATCH --partition=" in job
    top = job[job.index("RUN="):job.index("restarts=")]
    told = subprocess.run(["bash", "-c", top + 'printf "%s\\n" "$RUN" "$FOLDER" "$PER_NODE" "$START" "${ARGS[@]}"'],
                          capture_output=True, text=True).stdout.splitlines()
    assert told == [str(EXAMPLE), str(folder), "2", "srun", "train.steps=700", "optimizer.lr=1e-3"]
    template = slurm.TEMPLATE.read_text()
    changed = set(job.splitlines()) - set(template.splitlines())
    assert len(changed) == 13                               # and nothing else
    (column,) = {line.index("#") for text in (job, template) for line in text.splitlines() if line.startswith("PER_N")}
    assert column > 20                                      # comments stay where they are


def test_names_and_partitions_are_quoted_as_slurm_reads_them(printed, capsys, tmp_path):
    (tmp_path / "a run.toml").write_bytes(EXAMPLE.read_bytes())
    assert cli.main(["slurm", str(tmp_path / "a run.toml"), ON_8, "--partition", "gpu#2"]) == 0
    options = [shlex.split(line[8:], comments=True) for line in capsys.readouterr().out.splitlines()
               if line.startswith("#SBATCH ")]
    assert ["--job-name=a run"] in options
    assert ["--partition=gpu#2"] in options


@pytest.mark.parametrize("settings", [
    ["parallel.tp=2", "parallel.copies=true"], ["train.device=cuda"], ["parallel.shard_ctas=4"],
    ["train.graph=true", "parallel.shard=false", "train.device=auto"],
    ["parallel.engine=deepspeed", "parallel.offload=true", "parallel.nvme=/local/disk"]], ids=lambda s: s[0])
def test_what_the_machine_that_prints_a_job_lacks_is_left_to_its_nodes(printed, monkeypatch, settings):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(zero, "missing", lambda *_: "no package, and no disk")
    job = printed(ON_8, *settings)
    assert f"\nARGS=({ON_8} {' '.join(settings)})" in job
    assert ("\nDISKS=(/local/disk) " in job) is ("parallel.nvme=/local/disk" in settings)


@pytest.mark.parametrize(("args", "says"), [
    (["parallel.tp=3"], "the number of processes = 8 is not divisible by parallel.tp x parallel.pp = 3; "),
    (["parallel.tp=2", "parallel.copies=true", "train.device=cpu"], "parallel.copies = true copies from GPU to GPU"),
    (["parallel.tp=2", "parallel.copies=true", "--per-node", "1", "--nodes", "2", "data.rows=1"],
     "parallel.copies = true copies between GPUs of one machine, but parallel.tp = 2 leaves its machine"),
    (["parallel.pp=2", "train.graph=true"], "train.graph = true records a pass from end to end, but parallel.pp = 2"),
    (["parallel.dp_replicate=16", "--nodes", "3"], "divisor of 24; or take 2 or 4 nodes"),
    (["--gpus", "4"], "--gpus 4 is not --per-node 8, and each process has one; make them equal, or ask"),
    (["--folder", str(EXAMPLE)], f"{EXAMPLE} is a file; give a folder with --folder"),
])
def test_what_can_run_on_no_machine_is_refused_before_the_queue(printed, args, says):
    assert says in printed(ON_8, *args, code=2)


@pytest.mark.parametrize(("nodes", "rows", "says", "way_out"), [
    ("1", 32, "dp = 8, cannot share out the batch: data.batch_tokens = 131072 must be a multiple of "
     "data.seq x data.rows x dp = 1024 x 32 x 8, and data.lanes = 32 one of dp; set data.rows=16", "rows=16"),
    ("3-4", 4, "--nodes 3 of 8 processes, dp = 24, cannot share out the batch: data.batch_tokens = 131072 must be a "
     "multiple of data.seq x data.rows x dp = 1024 x 4 x 24, and data.lanes = 32 one of dp; take 1, 2 or 4 nodes, "
     "or set data.lanes=48 data.batch_tokens=196608", "lanes=48 data.batch_tokens=196608"),
    ("2-5", 4, "--nodes 5 of 8 processes, dp = 40, cannot share out the batch: ", "lanes=40 data.batch_tokens=163840"),
    ("1-65536", 4, "take 1, 2 or 4 nodes, or set data.lanes=524288 ", ""),
])
def test_a_batch_that_cannot_be_dealt_to_the_nodes_is_named_with_a_way_out_that_is_one(printed, nodes, rows, says,
                                                                                     way_out):
    sentence = printed(f"data.rows={rows}", "--nodes", nodes, code=2)
    assert says in sentence
    assert sentence.endswith(f"{way_out}\n")
    if way_out:
        printed(f"data.rows={rows}", *f"data.{way_out}".split(), "--nodes", re.findall(r"--nodes (\d+) ", sentence)[0])


@pytest.mark.parametrize(("more", "fit"), [([], "2 4"), (["data.lanes=96", "data.batch_tokens=393216"], "")])
def test_a_job_of_as_many_nodes_as_there_are_knows_which_numbers_the_batch_can_be_dealt_to(printed, tmp_path: Path,
                                                                                         more: list[str], fit: str):
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "excluded").write_text("n7 its disk is full (job 3)\nn2 silent\nn7 silent\n")
    job = printed("--nodes", "2-4", "--per-node", "1", *more)
    assert "\n#SBATCH --nodes=2-4 " in job
    assert f"\nFIT=({fit}) " in job
    assert "\n#SBATCH --exclude=n2,n7\n" in job                # what an earlier job found unfit


@pytest.mark.parametrize("nodes", ["2-", "-2", "4-2", "0", "0-2", "1-2-3", "two", "1-65537"])
def test_numbers_of_nodes_that_are_none_are_refused(capsys, nodes):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["slurm", str(EXAMPLE), f"--nodes={nodes}"])
    assert f"{nodes} must be a number of nodes like 4, or a range like 2-4, up to 65536\n" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "seconds"), [
    ("90", 5400), ("0:30", 30), ("90:00", 5400), ("1:2:3", 3723), ("100:00:00", 360_000), ("1-2", 93_600),
    ("1-02:03", 93_780), ("1-2:3:4", 93_784), ("366-0", slurm.YEAR)])
def test_a_time_limit_in_any_form_of_slurm_is_read(limit: str, seconds: int):
    assert slurm.seconds(limit) == seconds


@pytest.mark.parametrize("limit", ["banana", "0", "0:0", "-5", "1-", "5m", ":5", "5:", "1:2:3:4", "1-2-3", "1-2:3:4:5",
                                   "366-1", "9" * 99, "", "12 :00", "1 ", "１"])
def test_a_time_limit_that_slurm_would_refuse_or_misread_is_refused(printed, limit: str):
    assert printed(ON_8, f"--time={limit}", code=2).endswith(
        "must be a time above 0 and up to a year, as minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, like "
        "12:00:00 or 2-12\n")


@pytest.mark.parametrize(("limit", "lead"), [("12", 180), ("24:00:00", 300)])
def test_a_job_of_a_short_limit_is_not_told_at_once_that_it_is_near(printed, limit: str, lead: int):
    assert f"\n#SBATCH --signal=B:USR1@{lead} " in printed(ON_8, "--time", limit)


def test_submitting_where_there_is_no_slurm_leaves_the_script(printed, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = printed("--submit", "--per-node", "4", code=2)
    assert f"sbatch is not on this machine; submit {tmp_path}/run/slurm/train.sbatch on" in said
    assert "\nFOLDER=" in (tmp_path / "run/slurm/train.sbatch").read_text()


@pytest.mark.parametrize("takes", [True, False])
def test_a_submitted_job_says_where_its_logs_go_and_a_refused_one_does_not(capsys, tmp_path: Path, monkeypatch, takes):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$@" >{tmp_path}/asked; {str(takes).lower()}\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cli.main(["slurm", str(EXAMPLE), "--folder", str(tmp_path / "run"), "--submit", ON_8]) == (0 if takes else 2)
    logs, (out, err) = tmp_path / "run" / "slurm", capsys.readouterr()
    assert (tmp_path / "asked").read_text() == f"--output={logs}/%x-%j.out {logs}/train.sbatch\n"
    assert (f"its logs go to {logs}; " in out) is takes
    assert (f"sbatch refused {logs}/train.sbatch, see above; where Slurm counts no GPUs" in err) is not takes


@pytest.mark.parametrize(("args", "line"), [
    ([], "#SBATCH --gpus-per-node=8"), (["--gpus", "0"], "##SBATCH --gpus-per-node=0"),
    (["train.device=cpu", "train.dtype=fp32"], "##SBATCH --gpus-per-node=0"),
    (["--per-node", "4", "--gpus", "4"], "#SBATCH --gpus-per-node=4")])
def test_slurm_is_asked_for_a_gpu_a_process_or_for_as_many_as_are_said(printed, args, line):
    assert f"\n{line}" in printed(ON_8, *args)


@pytest.mark.parametrize(("change", "is_new"), [
    ("true", False), ("mkdir step-00000910", True), ("rm -r step-00001000", False),
    ("mkdir step-00000910.tmp-ab", False), ("mkdir next; rm -r step-00001000; mv next step-00001000", True)])
def test_a_checkpoint_is_progress_if_it_was_not_there_before(tmp_path: Path, change: str, is_new: bool):
    """Also before one that is torn, and in its place."""
    folder = tmp_path / "a run" / "checkpoints"
    for step in ("00000900", "00001000"):
        (folder / f"step-{step}").mkdir(parents=True)
    lines = [line for line in slurm.TEMPLATE.read_text().splitlines() if line.startswith(("saves() ", "new() "))]
    asks = [f"FOLDER='{folder.parent}'", *lines, "before=$(saves)", f"cd '{folder}'; {change}", "new"]
    assert subprocess.run(["bash", "-c", "\n".join(asks)]).returncode == (0 if is_new else 1)


@pytest.mark.parametrize("name", ["generate", "prepare"])
def test_a_job_starts_its_command_and_writes_nothing_that_the_whole_world_may_change(tmp_path: Path, name: str):
    """Of train.sbatch, test_slurm.py: test_the_run_folder_says_what_ran_and_no_secrets."""
    (tmp_path / "srun").write_text("#!/bin/bash\numask\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_ON_NODE": "3"}
    script = slurm.ROOT / "slurm" / f"{name}.sbatch"
    done = subprocess.run(["bash", script], env=env, umask=0, capture_output=True, text=True)
    mask, *said = done.stdout.splitlines()
    assert mask == "0002"
    args = cli.parse(said[said.index("stepladder") + 1:])
    assert (args.command, getattr(args, "workers", 3)) == (name, 3)


@pytest.mark.parametrize("script", sorted((slurm.ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_every_job_is_bash_with_its_options_on_top(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith(("#SBATCH", "##SBATCH"))]
    assert all(line.startswith("#") for line in lines[:options[-1]])       # Slurm reads none after the first command
