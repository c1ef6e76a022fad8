"""How long a run takes to start, to save, and to go on after a kill: the program itself, watched from outside.

    python tests/bench/restarts.py RUN.toml [section.key=value ...]                # one process, one GPU or none
    python tests/bench/restarts.py RUN.toml --ranks 4 [section.key=value ...]      # under torchrun, which restarts it

The run is killed (SIGKILL, one rank of it) two steps after its third checkpoint, and ended when it goes on. Times are
those at which lines arrive in metrics.jsonl, so every step is logged unless --log-every says otherwise; what logging
costs is the difference between two runs of this program.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from stepladder.launch import config, rules


class Run:
    """A program under way, and when its lines arrived."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.folder, self.read = folder, 0
        self.alone = args.ranks == 1
        launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3", "--nproc-per-node",
                    str(args.ranks)] if not self.alone else []
        self.command = [sys.executable, *launcher, "-m", "stepladder.launch.cli", "train", str(args.run), "--folder",
                        str(folder), *args.change]
        self.published: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self.began = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)

    def until(self, last: Callable[[dict[str, Any]], Any]) -> list[tuple[int, float]]:
        """Wait for a line of the log; (step, when) of those that came since the last call."""
        file, got = self.folder / "metrics.jsonl", []
        while True:
            ended = self.process.poll()
            for path in self.folder.glob("checkpoints/*"):
                if ".tmp" not in path.name:
                    self.published.setdefault(path.name, time.perf_counter())
            if file.exists():
                self.read = min(self.read, file.stat().st_size)         # a resume cuts off what came after the save
                with file.open("rb") as f:
                    f.seek(self.read)
                    *lines, _ = f.read().split(b"\n")
                for line in lines:
                    self.read += len(line) + 1
                    record = json.loads(line)
                    got.append((record["step"], time.perf_counter()))
                    if last(record):
                        return got
            if ended is not None:
                sys.exit(f"the run ended with {ended}; its last step is {got[-1][0] if got else 'not known'}")
            time.sleep(0.002)

    def last_rank(self) -> int:
        """Process id of the last rank: the launcher's last child, or the one process, whose children read shards."""
        out = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        return self.process.pid if self.alone else int(out[-1])

    def end(self) -> None:
        """A launcher's ranks save first; one process is of no more use."""
        self.process.kill() if self.alone else self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("change", nargs="*", help="section.key=value")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--every", type=int, default=15, help="steps from checkpoint to checkpoint")
    parser.add_argument("--log-every", type=int, default=1)
    args = parser.parse_intermixed_args()
    args.change = [f"checkpoint.every={args.every}", f"train.log_every={args.log_every}", *args.change]
    try:
        rules.check(config.load(args.run, args.change), args.ranks)
    except (OSError, ValueError) as error:         # torchrun would start it four times, and bury the sentence
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(args, Path(scratch) / "run")
        first = run.until(lambda record: record["step"])[0][1] - run.began
        print(f"start to first step: {first:.1f} s", flush=True)
        steps = run.until(lambda record: record["step"] == 3 * args.every + 2)
        size = max(sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                   for path in run.folder.glob("checkpoints/*"))
        victim, at, killed = run.last_rank(), time.perf_counter(), time.time()
        os.kill(victim, signal.SIGKILL)
        if args.ranks == 1:
            run.end()
            run.start()
        step, again = run.until(lambda record: record.get("resumed"))[-1]
        events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
        loaded = next(e["time"] for e in reversed(events) if e["event"] == "resume") - killed
        print(f"kill to next step ({step}): {again - at:.1f} s, loaded after {loaded:.1f} s", flush=True)
        run.end()
    took = {n: b - a for (m, a), (n, b) in pairwise(steps) if n == m + args.log_every and n > 5}
    usual = median(t for n, t in took.items() if n % args.every > 2)
    print(f"a step: {1e3 * usual / args.log_every:.2f} ms, median of {len(took)}")
    # Its own line, and with it the call of save, comes before the line of the step; the step after it waits for copies.
    saves = [n for n in took if n % args.every == 0 and {n + 1, n + 2} <= {*took}]
    for n in saves:
        extra = [took[n + i] - usual for i in (0, 1, 2)]
        share = sum(extra) / usual
        print(f"a save: {', '.join(f'{1e3 * x:+.1f}' for x in extra)} ms for its step and the next two, "
              f"{100 * share:.1f} % of a step, {100 * share / args.every:.2f} % of the {args.every} from save to save")
    when = dict(steps)
    done = [t - when[n] for name, t in run.published.items()
            if (n := int("".join(filter(str.isdigit, name)) or 0)) in when]
    if done:
        print(f"a checkpoint of {size / 1e9:.2f} GB is published {min(done):.1f}-{max(done):.1f} s after its step: "
              f"{size / 1e9 / median(done):.2f} GB/s")


if __name__ == "__main__":
    main()
