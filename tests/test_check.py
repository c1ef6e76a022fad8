"""stepladder check names the machines that are unfit for a run, and those alone."""
from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from test_watch import ends

from stepladder.launch import check, cli, world

SMI = """#!/bin/sh
cat <<END
<?xml version="1.0" ?><nvidia_smi_log><attached_gpus>2</attached_gpus>
<gpu id="0:1"><fb_memory_usage><total>81559 MiB</total><reserved>600 MiB</reserved><used>2 MiB</used>
<free>80957 MiB</free></fb_memory_usage><ecc_errors><volatile><dram_correctable>3</dram_correctable>
<dram_uncorrectable>0</dram_uncorrectable></volatile></ecc_errors><remapped_rows>
<remapped_row_pending>No</remapped_row_pending></remapped_rows><gpu_recovery_action>None</gpu_recovery_action></gpu>
<gpu id="0:2">{}</gpu></nvidia_smi_log>
END
exit {}
"""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine of two GPUs; nvidia-smi says `ails` of the second."""
    def machine(ails: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(SMI.format(ails, code))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return machine


@pytest.mark.parametrize(("ails", "says"), [
    ("<fb_memory_usage><total>81559 MiB</total><free>40000 MiB</free></fb_memory_usage>",
     "GPU 0:2 has 39.1 of 79.6 GiB free, others use it"),
    ("<ecc_errors><volatile><dram_uncorrectable>2</dram_uncorrectable></volatile></ecc_errors>",
     "GPU 0:2 has 2 uncorrectable memory errors"),
    ("<remapped_rows><remapped_row_failure>Yes</remapped_row_failure></remapped_rows>",
     "GPU 0:2 has remapped row failure"),
    ("<gpu_recovery_action>Drain and Reset</gpu_recovery_action>", "GPU 0:2 wants Drain and Reset"),
    ("<ecc_errors><volatile><dram_uncorrectable>N/A</dram_uncorrectable></volatile></ecc_errors>", "fit"),
    ("", "fit"),
])
def test_a_gpu_that_nvidia_smi_complains_of_is_named(gpus, capsys, ails: str, says: str):
    gpus(ails)
    assert cli.main(["check", "--gpus", "2"]) == (says != "fit")
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(("args", "says"), [
    (["--gpus", "8"], "torch finds 2 GPUs instead of 8; nvidia-smi ended with 9: "),
    (["--disk", "/dev/null/x"], "--disk /dev/null/x is not there; make it, or name a folder"),
    (["--disk", __file__], f"--disk {__file__} is a file; name a folder"),
    (["--disk", "/sys/fs"], "/sys/fs has 0 GiB free, 10 are wanted"),
    (["--disk", "/proc"], "/proc cannot be written to ("),
    (["--disk", "/tmp", "--gib", "1e9"], " GiB free, 1e+09 are wanted"),
    (["--also", "echo first; echo fan 3 stands still >&2; exit 4"], "exit 4 ended with 4: fan 3 stands still"),
    (["--also", "sleep 9", "--minutes", "0.005"], "sleep 9 was not over in 0.3 s; what takes longer "),
])
def test_what_is_wrong_with_this_machine_is_said(gpus, capsys, tmp_path: Path, args: list[str], says: str):
    gpus("", code=9)
    bad = tmp_path / "bad"
    assert cli.main(["check", *args, "--bad", str(bad)]) == 1
    out = capsys.readouterr().out
    assert says in out
    assert bad.read_text() == out.replace(": ", " ", 1)


def test_a_mistyped_folder_is_named_and_not_made(capsys, tmp_path: Path):
    missing = tmp_path / "no" / "such"
    assert cli.main(["check", "--disk", str(missing)]) == 1
    assert f": --disk {missing} is not there; make it, or name a folder\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("args", "says"), [
    (["--bad", "no/such/file"], "--bad no/such/file: there is no folder no/such; make it, or give another file"),
    (["--nodes", "n1", "n2"], "the number of processes = 1 is not divisible by that of --nodes = 2; give the names "),
    (["--gib", "9"], "--gib 9 is about the folders of --disk, and none is given; add --disk DIR"),
    (["--gpus=-1"], "argument --gpus: -1 must be an integer, 0 or more"),
])
def test_what_cannot_be_checked_is_refused_before_work(monkeypatch, capsys, args: list[str], says: str):
    monkeypatch.setattr(check, "faults", lambda *_: pytest.fail("the machine would have been looked at"))
    try:
        code = cli.main(["check", *args])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_every_process_looks_for_the_folder_of_bad_as_the_others_would_wait_for_one_that_is_refused(monkeypatch):
    monkeypatch.setattr(world, "find", lambda: world.World(1, 2))
    monkeypatch.setattr(world.World, "meet", lambda *_, **__: pytest.fail("it would have waited"))
    assert cli.main(["check", "--nodes", "n1", "n2", "--bad", "no/such/file"]) == 2


def looks(rank: int, n: int, bad: Path, crime: str) -> None:
    """`stepladder check` on four processes of the machines n1 and n2."""
    if crime == "silent" and rank == 3:
        return time.sleep(4)
    check.GOODBYE = timedelta(seconds=0.5)                    # who is silent does not hear it
    if crime == "counted" and rank > 1:                       # as torchrun on n2 does, which was started later
        found = world.find()
        world.find = lambda: replace(found, attempt=2)
    if crime == "sum" and rank == 3:
        check.add_up = lambda *_: None
    also = "test $RANK != 2" if crime == "one" else "false" if crime == "all" else "true"
    cli.main(["check", "--nodes", "n1", "n2", "--also", also.replace("$RANK", str(rank)), "--bad", str(bad),
              "--minutes", "0.03" if crime in ("silent", "sum") else "0.5"])


@pytest.mark.parametrize(("crime", "code", "says"), [
    ("", 0, ""), ("counted", 0, ""), ("one", 1, "n2 test 2 != 2 ended with 1\n"), ("all", 1, ""),
    ("silent", 1, "n2 silent for 2 s\n"), ("sum", 1, "n2 sum inside: silent for 2 s\n")])
def test_the_machine_at_fault_is_named_and_none_where_all_are(tmp_path: Path, crime: str, code: int, says: str):
    bad = tmp_path / "bad"
    ended = ends(4, looks, tmp_path, bad, crime)
    assert ended[0] == (code, "")
    assert bad.read_text() == says
