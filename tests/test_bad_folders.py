"""Run folders and checkpoints that a start must refuse, leaving them as they are, and runs that come to grief."""
# ruff: noqa: F811  fixtures are imported
from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from corpora import corpus, texts
from refusals import FOLDER, FULL, before_work, here, prepared, refused, train  # noqa: F401

from stepladder.launch import cli, events, status
from stepladder.parallel.checkpoint import valid
from stepladder.parallel.lock import Lock


def saved() -> list[str]:
    return sorted(path.name for path in FOLDER.glob("checkpoints/*"))


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file() and path.name != ".lock"}


def records() -> list[dict]:
    return [json.loads(line) for line in Path(FOLDER, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("content", ["nothing", "no folder", "files of another program"])
def test_a_folder_without_checkpoints_cannot_be_resumed(before_work, content):
    if content != "no folder":
        FOLDER.mkdir(parents=True)
    if content.startswith("files"):
        Path(FOLDER, "checkpoints").mkdir()
        Path(FOLDER, "notes.txt").write_text("mine")
    way_out = "drop --resume must to start afresh"
    assert before_work("--resume", "must") == f"{FOLDER} has no checkpoint to resume from; {way_out}"


@pytest.mark.parametrize("resume", ["must", "auto", "never"])
def test_checkpoints_of_another_program_are_neither_read_nor_removed(refused, resume):
    theirs = FOLDER / "checkpoints" / "step-00000007"
    theirs.mkdir(parents=True)
    (theirs / "checkpoint.json").write_text('{"theirs": 1}')
    sentence, _ = refused("train", "run.toml", "--resume", resume)
    assert sentence.startswith(f"no checkpoint in {theirs.parent} is sound: {theirs / 'checkpoint.json'} is damaged")
    assert sentence.endswith("; restore one or start in another folder")
    assert (theirs / "checkpoint.json").read_text() == '{"theirs": 1}'


def test_a_folder_in_use_is_refused(before_work):
    FOLDER.mkdir(parents=True)
    reader, writer = os.pipe()
    child = os.fork()                           # locks are between processes
    if child == 0:
        with Lock(FOLDER):
            os.write(writer, b"x")
            signal.pause()
    try:
        os.read(reader, 1)
        sentence = before_work()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert sentence.startswith(f"run folder {FOLDER} is in use by process {child} on host ")
    assert sentence.endswith("; stop it or give this run another folder")


@pytest.fixture
def trained(train) -> list[str]:
    train()
    return saved()


@pytest.mark.parametrize(("change", "says"), [
    ("model.width=32", ("model.width: the checkpoint was made with 16, this run has 32; ", "start a new run folder")),
    (f"{FULL}.channel.hidden=32", (f"{FULL}.channel.hidden: the checkpoint was made with 16, this run has 32; ",)),
    ("data.sources.small.weight=2", ("data: the checkpoint was made with '", ", this run has '", "new run folder")),
    ("data.lanes=2", ("made with lanes = 4, this run has 2; ", "start a new run folder")),
    ("train.seed=3", ("made with seed = 0, this run has 3; ", "start a new run folder")),
    ("data.heldout=0.1", ("made with heldout = 0.0, this run has 0.1; ", "start a new run folder")),
    ("train.dtype=fp64", ("model/embed.table is torch.float32 in the checkpoint, torch.float64 in this model",)),
    ("train.steps=1", (f"train.steps = 1, but {FOLDER}/checkpoints/step-00000002 has made 2 steps; raise",)),
])
def test_a_start_that_does_not_fit_a_run_is_refused_by_the_key_and_leaves_the_run_as_it_was(trained, refused, change,
                                                                                           says):
    (FOLDER / "unfinished").write_text("stopped by SIGTERM at step 2\n")
    before = files()
    sentence, out = refused("train", "run.toml", "train.steps=4", change)
    assert all(part in sentence for part in says), sentence
    assert " loss " not in out
    assert files() == before
    assert status.said(FOLDER, time.time())["run"] == f"{FOLDER}: stopped by SIGTERM at step 2"


def test_a_start_without_the_tokenizer_leaves_the_records_that_were_not_saved(trained, refused):
    with open(FOLDER / "metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n')
    Path("shards/tokenizer.json").unlink()
    before = files()
    assert "shards/tokenizer.json" in refused("train", "run.toml", "train.steps=4")[0]
    assert files() == before


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.parametrize("command", ["train run.toml", "prepare run.toml --out out"])
def test_a_file_system_without_locks_is_named(refused, monkeypatch, number, command):
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    where = FOLDER / ".lock" if command.startswith("train") else "out"
    sentence, _ = refused(*command.split())
    assert sentence.startswith(f"{where} cannot be locked ({os.strerror(number)}); mount its file system with locks")


def test_a_resume_on_a_full_disk_names_the_file_it_could_not_write(trained, refused, monkeypatch):
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "metrics.tmp":
            write(self, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    before = (FOLDER / "metrics.jsonl").read_bytes()
    assert refused("train", "run.toml", "train.steps=4")[0] == f"{FOLDER}/metrics.tmp: No space left on device"
    assert (FOLDER / "metrics.jsonl").read_bytes() == before
    assert not (FOLDER / "metrics.tmp").exists()


def test_a_program_that_is_killed_while_it_writes_the_configuration_leaves_the_one_before(trained, monkeypatch):
    write, before = Path.write_text, (FOLDER / "config.toml").read_bytes()

    def half(self: Path, text: str, *args: Any, **kw: Any) -> int:
        if not self.name.startswith("config"):
            return write(self, text, *args, **kw)
        write(self, text[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    assert cli.main(["train", "run.toml", "train.steps=4"]) == 130
    assert (FOLDER / "config.toml").read_bytes() == before


def test_what_a_resume_changes_of_a_run_is_said_and_kept(trained, train):
    out = train("train.steps=3", "optimizer.lr=1e-4", "data.batch_tokens=512", "train.dtype=bf16", "train.clip=0.5")
    assert ("changed since step 2: data.batch_tokens 256 -> 512, train.steps 2 -> 3, train.dtype fp32 -> bf16, "
            "train.clip 1.0 -> 0.5, optimizer.lr 0.001 -> 0.0001\n") in out
    assert events.read(FOLDER)[-2]["changed"]["train.dtype"] == ["fp32", "bf16"]
    assert " 1,024 tokens in all" in out
    out = train("train.steps=4")
    assert "changed since step 3: data.batch_tokens 512 -> 256, " in out
    assert " 1,280 tokens in all" in out
    assert "step 4 of 4, 1,280 tokens" in out
    assert "changed" not in train("train.steps=4")
    assert "changed" not in events.read(FOLDER)[-2]


def test_a_checkpoint_of_other_shards_is_refused(trained, refused, tmp_path):
    corpus(tmp_path / "new", texts(90, "b"))
    sentence, _ = refused("train", "run.toml", "train.steps=4", "data.sources.small.shards=new")
    assert sentence.startswith("data: the checkpoint was made with '")
    assert saved() == trained
    assert not (FOLDER / "unfinished").exists()                  # it was finished, and still is


def test_a_run_that_has_checkpoints_is_not_started_afresh(trained, refused):
    sentence, _ = refused("train", "run.toml", "--resume", "never")
    assert sentence.startswith(f"{FOLDER} holds checkpoints already; give another folder with ")
    assert saved() == trained


def test_a_damaged_checkpoint_is_passed_over_but_the_last_one_is_not_replaced_by_a_fresh_start(train, refused):
    train("checkpoint.every=1")
    first, second = sorted(FOLDER.glob("checkpoints/*/rank-00000.bin"))
    os.truncate(second, 9)
    out = train("train.steps=1")
    assert f"passed over step-00000002: {second} has 9 bytes instead of " in out
    assert "taking step-00000001 instead" in out
    (passed,) = events.read(FOLDER)[-2]["passed_over"]
    assert passed.startswith(f"{second} has 9 bytes instead of ")
    os.truncate(first, 9)
    sentence, _ = refused("train", "run.toml")
    assert sentence.startswith(f"no checkpoint in {FOLDER / 'checkpoints'} is sound: ")
    assert len(saved()) == 2


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(trained, train):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))    # the log fits, a checkpoint does not
    try:
        out = train("train.steps=5", "checkpoint.every=2", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for step in (4, 5):
        assert f"step {step} was not saved in {FOLDER / 'checkpoints'} (rank 0: [Errno 27] File too large); " in out
    assert "the checkpoints before it are untouched" in out
    assert "the last step is not saved; make room if a disk is full, then run the same again" in out
    losses = [r["loss"] for r in records()]
    assert [r["step"] for r in records()] == [1, 2, 3, 4, 5]
    assert saved() == trained == ["step-00000002"]
    assert valid(FOLDER / "checkpoints" / "step-00000002") is None
    train("train.steps=5", "--resume", "must")                   # there is room again
    assert [r["loss"] for r in records()] == losses
    assert saved() == ["step-00000002", "step-00000005"]


def test_a_folder_that_holds_something_else_is_left_alone(refused):
    mine = Path("mine")
    mine.mkdir()
    (mine / "config.toml").write_text("precious")
    sentence, _ = refused("train", "run.toml", "--folder", "mine")
    assert sentence == "mine holds 'config.toml' and no run; give a new or empty folder with --folder"
    assert [f.read_text() for f in mine.iterdir()] == ["precious"]
    sentence, _ = refused("train", "run.toml", "--folder", "run.toml")
    assert sentence == "run.toml is a file; give a folder with --folder"
    sentence, _ = refused("train", "run.toml", "--folder", "run.toml/run")
    assert sentence == "--folder run.toml/run cannot be made (Not a directory); give another"


def test_a_start_that_is_refused_leaves_no_folder_that_it_made(refused):
    sentence, _ = refused("train", "run.toml", "data.sources.small.shards=nowhere", "--folder", "new")
    assert sentence.startswith("nowhere/manifest.json: cannot be read")
    assert not Path("new").exists()
    Path("mine").mkdir()
    refused("train", "run.toml", "data.sources.small.shards=nowhere", "--folder", "mine")
    assert Path("mine").exists()


# --- while it trains


BROKEN = ("run.toml", "train.steps=50", "train.max_skipped=3", "optimizer.lr=1e30")


def test_steps_that_stay_non_finite_stop_the_run_and_it_goes_on_from_before_them(trained, refused, train):
    sentence, out = refused("train", *BROKEN)
    assert sentence == ("3 steps in a row, 4 to 6, had a gradient that is not finite and changed nothing; run the same "
                        "again with a lower optimizer.lr: it goes on from step 2, or raise train.max_skipped if it is "
                        "the data")
    assert records()[-1]["skipped"] == 3
    assert out.count("grad not finite") == 3
    assert saved() == trained
    assert "from step 2 in " in train("train.steps=3")


def test_checkpoints_of_steps_that_changed_nothing_push_no_other_out(trained, refused, train):
    sentence, out = refused("train", *BROKEN, "checkpoint.every=1", "checkpoint.keep_last=2")
    assert saved() == [*trained, "step-00000003"]                # whose step made the weights what they are
    assert out.count("is not saved: ") == 3
    assert "changed nothing; remove step-00000003 from runs/run/checkpoints and run the same again" in sentence
    assert sentence.count("it goes on from step 2, ") == 1
    shutil.rmtree(FOLDER / "checkpoints/step-00000003")
    assert "from step 2 in " in train("train.steps=4")
    assert records()[-1]["skipped"] == 0


def test_the_last_step_is_saved_though_it_changed_nothing_and_pushes_none_out(trained, refused, train):
    train(*BROKEN[1:], "checkpoint.keep_last=1", "--steps-now", "3")
    assert saved() == [*trained, "step-00000005"]
    sentence, _ = refused("train", *BROKEN)                      # the streak goes on where it was
    assert sentence.startswith("3 steps in a row, 4 to 6, had ")
    assert " remove step-00000005 from " in sentence


def test_a_stop_signal_saves_and_ends_with_code_0(train):
    def ask() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (Path(FOLDER, "metrics.jsonl").exists() and len(records()) >= 3):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    train("train.steps=2000", "checkpoint.every=0")
    asking.join()
    step = records()[-1]["step"]
    assert 3 <= step < 1000
    assert saved() == [f"step-{step:08d}"]
    assert f"from step {step} in " in train(f"train.steps={step + 1}", "--resume", "must")


def test_a_finished_run_keeps_the_configuration_that_it_was_trained_with(trained, train):
    before = (FOLDER / "config.toml").read_bytes()
    assert "the run is finished: train.steps = 2; raise it to go on" in train("optimizer.lr=1e-4")
    assert (FOLDER / "config.toml").read_bytes() == before
