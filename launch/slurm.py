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
from stepladder.launch.toml import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "slurm" / "train.sbatch"


def run(args: argparse.Namespace) -> int:
    """The program: `stepladder slurm`. What the run file cannot mean on so many ranks is said before the queue."""
    chosen = config.load(args.config, args.overrides)
    # A login node has no GPU, which says nothing about the nodes of the job.
    here = replace(chosen, train=replace(chosen.train, device="cpu", graph=False))
    low, high = args.nodes
    rules.check(here, low * args.per_node)
    fit = [n for n in range(low, high + 1) if _fits(here, n * args.per_node)]
    folder = Path(args.run or Path("runs") / Path(args.config).stem).absolute()
    options = {"job-name": Path(args.config).stem, "nodes": f"{low}-{high}" if low < high else f"{low}",
               "time": args.time, "partition": args.partition, "account": args.account,
               "gpus-per-node": str(args.per_node) if chosen.train.device != "cpu" else "",
               "exclude": ",".join(_excluded(folder)) or None}
    settings = {"RUN": str(Path(args.config).absolute()), "FOLDER": str(folder), "ARGS": args.overrides,
                "PER_NODE": str(args.per_node), "START": args.start, "RESTARTS": str(args.restarts),
                "FIT": [str(n) for n in fit] if len(fit) <= high - low else [],
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


def _fits(run: config.Run, processes: int) -> bool:
    try:
        rules.check(run, processes)
    except ConfigError:
        return False
    return True


def _excluded(folder: Path) -> list[str]:
    """The nodes that an earlier job of this run found unfit."""
    file = folder / "slurm" / "excluded"
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted({line.split()[0] for line in lines if line.strip()})


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
