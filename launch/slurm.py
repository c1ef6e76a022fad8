"""stepladder slurm: slurm/train.sbatch filled in for a run, printed or submitted."""
from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from stepladder.launch import config, rules

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "slurm" / "train.sbatch"


def run(args: argparse.Namespace) -> int:
    """The program: `stepladder slurm`. What the run file cannot mean on so many ranks is said before the queue."""
    chosen = config.load(args.config, args.overrides)
    # A login node has no GPU, which says nothing about the nodes of the job.
    here = replace(chosen, train=replace(chosen.train, device="cpu", graph=False))
    rules.check(here, args.nodes * args.per_node)
    folder = Path(args.run or Path("runs") / Path(args.config).stem).absolute()
    options = {"job-name": Path(args.config).stem, "nodes": str(args.nodes), "time": args.time,
               "partition": args.partition, "account": args.account,
               "gpus-per-node": str(args.per_node) if chosen.train.device != "cpu" else ""}
    settings = {"RUN": str(Path(args.config).absolute()), "FOLDER": str(folder), "ARGS": args.overrides,
                "PER_NODE": str(args.per_node), "START": args.start, "RESTARTS": str(args.restarts),
                "BIN": str(Path(sys.executable).parent), "CODE": str(ROOT)}
    text = filled(TEMPLATE.read_text(), options, settings)
    if not args.submit:
        print(text, end="")
        return 0
    script = folder / "slurm" / "train.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text)
    try:
        return subprocess.run(["sbatch", f"--output={folder}/slurm/%x-%j.out", str(script)]).returncode and 2
    except FileNotFoundError:
        raise ValueError(f"sbatch is not on this machine; submit {script} on a login node of the cluster") from None


def filled(text: str, options: dict[str, str | None], settings: dict[str, str | list[str]]) -> str:
    """The script with other values. options: of #SBATCH, "" takes one out and None leaves it; settings: NAME=value."""
    for name, value in options.items():
        if value is not None:
            mark = "#SBATCH" if value else "##SBATCH"
            text = _sub(text, rf"^#+SBATCH (--{name}=)\S+( *)", lambda m, mark=mark, value=value:
                        f"{mark} {m[1]}{value or '0'}{m[2]}")
    for name, value in settings.items():
        word = f"({shlex.join(value)})" if isinstance(value, list) else shlex.quote(value)
        text = _sub(text, rf"^({name}=)(?:\([^)]*\)|\S+)( *)", lambda m, word=word: f"{m[1]}{word}{m[2]}")
    return text


def _sub(text: str, pattern: str, put) -> str:
    text, count = re.subn(pattern, put, text, flags=re.MULTILINE)
    assert count == 1, f"{TEMPLATE} has {count} lines like {pattern}"
    return text
