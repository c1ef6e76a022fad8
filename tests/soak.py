"""Kills a run again and again at random moments: its losses must be, bit for bit, those of an undisturbed one.

    make soak                                    # four processes, 300 steps, 50 kills
    python tests/soak.py --kills 5 --steps 60    # a quick try
    python tests/soak.py --seed 17               # the moments of another seed

Each time some of the processes get SIGKILL, from one to all, after a random time or in the middle of a save; the others
have to end by themselves, and all are started again. A save is as likely to be cut as a step.
"""
from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import corpora
import ranks
import torch
from test_resume import RUN, records

from stepladder.launch import cli, events

RANKS, EVERY = 4, 3
LIMIT = 120.0             # seconds for those that were not killed to notice


def start(config: Path, run: Path) -> Sequence[BaseProcess]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [ranks.process(train, rank, port, config, run) for rank in range(RANKS)]
    for p in processes:
        p.start()
    return processes


def train(rank: int, port: int, config: Path, run: Path) -> None:
    """`stepladder train`, told by the environment, in a process that need not import torch first."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(RANKS), RANK=str(rank))
    said = os.open(f"{run}-said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    code = cli.main(["train", str(config), "--folder", str(run)])
    sys.stdout.flush()
    os._exit(code)


def whole(config: Path, run: Path) -> list[int]:
    processes = start(config, run)
    for p in processes:
        p.join()
    return [p.exitcode or 0 for p in processes]


def moment(rng: random.Random, run: Path, processes: Sequence[BaseProcess]) -> str:
    """Wait for the moment to strike; "" if the run ends before."""
    at, now = progress(run) + rng.randrange(1, 2 * EVERY), time.monotonic()
    where = rng.choice(("in a save", "at any time"))
    while all(p.is_alive() for p in processes):
        saving = any(run.glob("checkpoints/*.tmp-*"))
        if progress(run) >= at and (saving or where != "in a save" or time.monotonic() - now > 30):
            time.sleep(rng.random() * 0.1)
            return where
        time.sleep(0.002)
    return ""


def progress(run: Path) -> int:
    """The last step that is logged."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def kill(rng: random.Random, processes: Sequence[BaseProcess]) -> list[int]:
    victims = rng.sample(range(RANKS), rng.choice((1, 1, 2, RANKS)))
    for rank in victims:
        processes[rank].kill()
    end = time.monotonic() + LIMIT
    for p in processes:
        p.join(max(0.1, end - time.monotonic()))
        assert not p.is_alive(), "a rank hangs"
    return sorted(victims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, rng = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(args.seed)
    shards = corpora.corpus(folder / "shards", corpora.texts(400))
    text = RUN.replace("SHARDS", str(shards)).replace("WORKERS", "0").replace("rows = 4", "rows = 2")
    text = text.replace("steps = 12", f"steps = {args.steps}").replace("keep_last = 20", "keep_last = 2")
    (folder / "run.toml").write_text(text.replace("[train]\n", "[train]\ncollective_minutes = 0.25\n"))
    print(f"{folder}: seed {args.seed}, {RANKS} processes, {args.steps} steps", flush=True)
    assert whole(folder / "run.toml", folder / "whole") == [0] * RANKS
    run, began, killed = folder / "run", time.monotonic(), 0
    while killed < args.kills:
        processes = start(folder / "run.toml", run)
        if not (where := moment(rng, run, processes)):
            break
        at = progress(run)
        killed += 1
        print(f"{killed:3d}  after step {at}, {where}: rank {kill(rng, processes)}", flush=True)
    assert whole(folder / "run.toml", run) == [0] * RANKS
    ours, theirs = records(run), records(folder / "whole")
    assert list(ours) == list(theirs) == list(range(1, args.steps + 1))
    for step, record in ours.items():
        assert record["loss"] == theirs[step]["loss"], f"step {step}: {record['loss']} and not {theirs[step]['loss']}"
        assert record["grad_norm"] == theirs[step]["grad_norm"], step
    told = [e["event"] for e in events.read(run)]
    print(f"{killed} kills in {(time.monotonic() - began) / 60:.0f} minutes: {args.steps} losses are bitwise those of "
          f"the undisturbed run; {told.count('resume')} resumes and {told.count('fault')} faults in events.jsonl")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
