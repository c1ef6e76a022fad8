"""The whole walk on a small machine, by the commands that a person would type."""
from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CLI = [sys.executable, "-m", "stepladder.launch.cli"]
FOUR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", CLI[2]]
MADE_HERE = "made by stepladder demo"     # a file of this name: the folder may be made anew
TOGETHER = 10                             # steps on four processes
ROUNDING = 1e-3                           # nats; fp32 sums in another order differ by less

Records = dict[int, dict[str, Any]]       # of metrics.jsonl, by step


class DemoError(RuntimeError):
    """A step of the demo did not do what it is there to show."""


def run(args: Namespace) -> int:
    """stepladder demo [--out DIR]"""
    walk(Path(args.out), EXAMPLES / "demo.toml", EXAMPLES / "shakespeare.jsonl.zst")
    return 0


def walk(out: Path, config: Path, corpus: Path) -> None:
    """Run the demo into `out`; DemoError, FileNotFoundError or FileExistsError where it cannot be shown."""
    for path in (config, corpus):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run the demo from a checkout of the repository")
    _clear(out)
    began = time.monotonic()
    settings = tomllib.loads(config.read_text())
    plays, one, four = out / "plays", out / "run", out / "four"
    shards = f"data.sources.plays.shards={plays}"

    _title("1  prepare: plays into token shards, with a vocabulary trained on them")
    _call(CLI, "prepare", corpus, "--train-tokenizer", settings["model"]["vocab"], "--out", plays)

    _title("2  train, and kill -9 half-way")
    every = settings["checkpoint"]["every"]
    halfway = settings["train"]["steps"] // 2 // every * every + every // 2      # between two checkpoints
    killed = _train_until(halfway, one, [*CLI, "train", config, "--folder", one, shards])
    print(f"\nkilled, with no chance to save, after step {max(killed)}")
    shutil.copytree(one / "checkpoints", four / "checkpoints")

    _title("3  resume from the newest checkpoint")
    _call(CLI, "train", config, "--folder", one, shards, "--resume", "must")
    print(f"\n{same_bits(killed, _records(one))}")

    _title("4  the same checkpoint on 4 processes: 2 tensor-parallel x 2 pipeline stages")
    _call(FOUR, "train", config, "--folder", four, shards, "--resume", "must", "--steps-now", TOGETHER,
          "parallel.tp=2", "parallel.pp=2", f"data.rows={settings['data']['rows'] // 2}", "train.log_every=1",
          threads=1)
    print(f"\n{same_but_rounding(_records(four), _records(one))}")

    _title("5  draw the curves")
    _call(CLI, "plot", one, "--out", out / "curves.png")

    _title("6  sample")
    _call(CLI, "generate", one, "--prompt", "ROMEO\n", "--tokens", 200, "--temperature", 0.7, "--top-p", 0.95,
          "--seed", 1)

    _title(f"done in {time.monotonic() - began:.0f} s")
    programs = Path(os.path.relpath(Path(sys.executable).parent))
    print(f"""\
{plays}   shards and the vocabulary
{one}     checkpoints, metrics.jsonl, tensorboard/, config.toml
{out / 'curves.png'}   the curves; the dashed line is the resume

next:
  {programs}/stepladder generate {one} --prompt HAMLET --temperature 0.8
  {programs}/stepladder inspect {plays} --documents 2
  {programs}/tensorboard --logdir {one}
  README.md, "A real run\"""")


def same_bits(killed: Records, resumed: Records) -> str:
    """Compare the steps that both computed; DemoError if a loss or a gradient norm differs in one bit."""
    first = next((step for step, record in resumed.items() if record.get("resumed")), None)
    twice = [step for step in killed if first is not None and step >= first]
    if not twice:
        raise DemoError("no step was computed twice, so the resume has not been shown to be exact; run the demo again")
    for step in twice:
        for key in ("loss", "grad_norm"):
            a, b = killed[step][key], resumed[step][key]
            if a is None or a != b:      # None: it was not finite
                raise DemoError(f"step {step} had {key} {a!r} before the kill and {b!r} after; the resume is not exact")
    last = twice[-1]
    return (f"steps {twice[0]}-{last} were computed twice, before the kill and after the resume:\n"
            f"{len(twice)} of {len(twice)} losses and gradient norms are bitwise equal "
            f"(step {last}: {killed[last]['loss']!r} and {resumed[last]['loss']!r})")


def same_but_rounding(four: Records, one: Records) -> str:
    """The losses of four processes beside one process's; DemoError if they differ by more than rounding."""
    pairs = [(step, record["loss"] or math.nan, one[step]["loss"] or math.nan) for step, record in four.items()]
    lines = ["step   4 processes   1 process", *(f"{s:4}  {a:12.6f}  {b:10.6f}" for s, a, b in pairs)]
    worst = max((abs(a - b) for _, a, b in pairs), default=math.nan)
    if not all(abs(a - b) < ROUNDING for _, a, b in pairs) or not pairs:
        raise DemoError(f"losses on 4 processes differ from one process's by {worst}, more than rounding ({ROUNDING})")
    return "\n".join([*lines, f"they differ by {worst:.0e} at most: fp32 sums in another order"])


def _clear(out: Path) -> None:
    """An empty `out`; only a folder that the demo made is emptied."""
    mark = out / MADE_HERE
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise FileExistsError(f"{out} holds something that the demo did not make; name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mark.touch()


def _title(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def _call(program: list[str], *args: object, threads: int = 2) -> None:
    command = [*program, *map(str, args)]
    if code := subprocess.run(command, env=_environment(threads), check=False).returncode:
        raise DemoError(f"{shlex.join(command)} ended with exit code {code}; what it said stands above")


def _train_until(step: int, folder: Path, command: list[object]) -> Records:
    """Start the training, kill it when `step` is on record, and return what it has recorded."""
    child = subprocess.Popen([*map(str, command)], env=_environment(2))
    try:
        while max(_records(folder), default=0) < step:
            if child.poll() is not None:
                raise DemoError(f"the training ended with exit code {child.returncode} before step {step}")
            time.sleep(0.1)
    finally:
        child.kill()
        child.wait()
    return _records(folder)


def _records(folder: Path) -> Records:
    """What a run has recorded; the line that is being written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {record["step"]: record for record in (json.loads(line) for line in lines if line.endswith("\n"))}


def _environment(threads: int) -> dict[str, str]:
    # Bits depend on how many threads share a sum, so the number is fixed. Everything stays on this machine: gloo need
    # not look up its name, which fresh machines often do not know.
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONSAFEPATH": "1",
            "GLOO_SOCKET_IFNAME": "lo"}
