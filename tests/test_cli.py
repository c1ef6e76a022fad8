"""launch/cli.py: the console script's help, its exit codes, and that a user's mistake is one sentence."""
from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from stepladder.launch import cli
from stepladder.launch.config import ConfigError

HELP = [["--help"], *([name, "--help"] for name in cli.COMMANDS)]


def started(*args: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """What came of it, and the seconds of a core that it took: other work may share the cores."""
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "stepladder.launch.cli", *args], capture_output=True, text=True)
    after = os.times()
    return done, sum(after[2:4]) - sum(before[2:4])


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_starts_within_half_a_second(args):
    assert min(started(*args)[1] for _ in range(3)) < 0.5


def test_help_imports_neither_torch_nor_numpy():
    code = ("import sys; from stepladder.launch import cli\n"
            "try: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'numpy', 'stepladder.launch.train'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_programs_that_need_no_torch_do_not_wait_for_it():
    """It takes seconds, and on a login node many."""
    code = ("import sys; from stepladder.launch import compare, plot, prepare, status\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_help_lists_every_command():
    out = started("--help")[0].stdout
    for name in cli.COMMANDS:
        assert f"\n  {name} " in out


def test_every_command_has_an_example_that_parses():
    for name, text in cli.EXAMPLES.items():
        for line in text.splitlines():
            words = shlex.split(line)
            first = next((i for i, word in enumerate(words) if word in cli.COMMANDS), None)
            if first is None:
                assert "COMMAND" in words
                continue
            assert words[first] == name or name == "stepladder"
            assert cli.parse(words[first:]).command == words[first]


def test_overrides_may_stand_before_and_after_flags():
    args = cli.parse(["train", "run.toml", "train.steps=3", "--folder", "there", "data.seq=8", "--steps-now", "2"])
    assert args.overrides == ["train.steps=3", "data.seq=8"]
    assert (args.config, args.run, args.steps_now, args.resume) == ("run.toml", "there", 2, "auto")


@pytest.mark.parametrize(("args", "sentence"), [
    (["train", "run.toml", "--rum", "x=1"], "stepladder train: error: unknown arguments --rum"),
    (["train", "run.toml", "--folder", "x", "steps"], "stepladder train: error: unknown arguments steps"),
    (["train", "run.toml", "--steps-now", "0"], "argument --steps-now: 0 must be an integer, at least 1"),
    (["generate", "run", "--top-p", "1.5"], "argument --top-p: 1.5 must be a number above 0 and at most 1"),
    (["generate", "run", "--temperature", "nan"], "argument --temperature: nan must be a number, 0 or more"),
    (["prepare", "x", "--out", "y", "--block-bytes", "many"], "many must be a number of bytes above 0, like 4096"),
    (["inspect", "x", "--documents", "2", "y"], "stepladder inspect: error: unknown arguments y"),
    ([], "the following arguments are required: COMMAND"),
    (["trian", "run.toml"], "there is no command trian, did you mean train?; there are demo, support, keys, "),
])
def test_bad_arguments_are_named_and_exit_with_2(capsys, args, sentence):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_sizes_have_units():
    args = cli.parse(["prepare", "x", "--out", "y", "--block-bytes", "64K", "--shard-bytes", "2m"])
    assert (args.block_bytes, args.shard_bytes) == (65536, 2 * 2**20)


class OwnError(RuntimeError):
    pass


OwnError.__module__ = "stepladder.launch.train"


@pytest.mark.parametrize(("error", "sentence"), [
    (ConfigError("data.seq = 3 is odd; make it even"), "stepladder: data.seq = 3 is odd; make it even\n"),
    (FileNotFoundError(2, "No such file", "run.toml"), "stepladder: run.toml: No such file\n"),
    (PermissionError(13, "Permission denied", "/x"), "stepladder: /x: Permission denied\n"),
    (FileNotFoundError("run has no checkpoint"), "stepladder: run has no checkpoint\n"),
    (ImportError("webdataset is missing"), "stepladder: webdataset is missing\n"),
    (OwnError("10 steps were not finite"), "stepladder: 10 steps were not finite\n"),
])
def test_user_errors_are_one_sentence_and_exit_with_2(monkeypatch, capsys, error, sentence):
    program(monkeypatch, error)
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["support"]) == 2
    assert capsys.readouterr() == ("", sentence)


def program(monkeypatch, error: BaseException | None, result: int | None = None) -> None:
    """Let `stepladder support` raise `error`, or return `result`."""
    def run(_: object) -> int | None:
        if error is not None:
            raise error
        return result
    monkeypatch.setitem(cli.COMMANDS, "support", cli.Command("", lambda p: None, run))


def test_debug_shows_the_traceback(monkeypatch, capsys):
    program(monkeypatch, ValueError("wrong"))
    for args in (["--debug", "support"], ["support", "--debug"]):
        assert cli.main(args) == 2
        assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback_and_exits_with_1(monkeypatch, capsys):
    program(monkeypatch, TypeError("a bug"))
    assert cli.main(["support"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    program(monkeypatch, KeyboardInterrupt())
    assert cli.main(["support"]) == 130
    assert capsys.readouterr().err == ""


def test_other_ranks_say_which_they_are(monkeypatch, capsys):
    program(monkeypatch, ValueError("wrong"))
    monkeypatch.setenv("RANK", "3")
    cli.main(["support"])
    assert capsys.readouterr().err == "stepladder (rank 3): wrong\n"


def test_a_program_without_a_result_exits_with_0(monkeypatch):
    program(monkeypatch, None)
    assert cli.main(["support"]) == 0
    program(monkeypatch, None, 5)
    assert cli.main(["support"]) == 5


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f"{sys.executable} -m stepladder.launch.cli support | head -c 0", shell=True,
                          capture_output=True, text=True)
    assert done.stderr == ""


def test_support_prints_the_table(capsys):
    assert cli.main(["support"]) == 0
    assert "| one rank | yes |" in capsys.readouterr().out


def test_a_missing_run_file_is_one_sentence_from_the_real_program():
    done, _ = started("train", "nowhere.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "stepladder: nowhere.toml: No such file or directory\n"


def test_the_flag_that_deepspeeds_launcher_adds_is_passed_over():
    assert cli.parse(["--local_rank=1", "train", "run.toml", "train.steps=3"]).overrides == ["train.steps=3"]


def test_what_a_command_writes_is_not_the_whole_worlds_to_change(tmp_path):
    """The job cannot be submitted here, its script is there."""
    run, mask = tmp_path / "run", os.umask(0)
    try:
        assert cli.main(["slurm", "examples/demo.toml", "--per-node", "1", "--folder", str(run), "--submit"]) == 2
    finally:
        os.umask(mask)
    assert {path.name: oct(path.stat().st_mode & 0o002) for path in [run, *run.rglob("*")]
            } == {name: "0o0" for name in ("run", "slurm", "train.sbatch")}
