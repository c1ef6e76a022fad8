"""stepladder slurm: slurm/train.sbatch filled in for a run, printed or submitted."""
from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from stepladder.launch import config, rules, world
from stepladder.launch.toml import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "slurm" / "train.sbatch"
LEAD = 300                       # seconds before its limit in which a job saves; of a short one a quarter
YEAR = 366 * 24 * 3600


def run(args: argparse.Namespace) -> None:
    """The program: `stepladder slurm`. What can run on no machine is said before the queue, the rest on the nodes."""
    folder = Path(args.run or Path("runs") / Path(args.config).stem).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder with --folder")
    limit = seconds(args.time)
    chosen = config.load(args.config, args.overrides)
    gpus = chosen.train.device != "cpu"
    # Whether there are GPUs is known on the nodes: this may be a login node, which has none.
    there = replace(chosen, train=replace(chosen.train, device="cuda")) if gpus else chosen
    asked = args.gpus if args.gpus is not None else args.per_node if gpus else 0
    if gpus and asked not in (0, args.per_node):
        raise ValueError(f"--gpus {asked} is not --per-node {args.per_node}, and each process has one; make them "
                         "equal, or ask Slurm for none with --gpus 0")
    low, high = args.nodes
    fit = dealt(there, low, high, args.per_node)
    options = {"job-name": Path(args.config).stem, "nodes": f"{low}-{high}" if low < high else f"{low}",
               "time": args.time, "partition": args.partition, "account": args.account,
               "gpus-per-node": str(asked or ""), "chdir": str(Path.cwd()),
               "signal": f"B:USR1@{min(LEAD, limit // 4)}", "exclude": ",".join(_excluded(folder)) or None}
    settings = {"RUN": str(Path(args.config).absolute()), "FOLDER": str(folder), "ARGS": args.overrides,
                "PER_NODE": str(args.per_node), "START": args.start, "RESTARTS": str(args.restarts),
                "FIT": [str(n) for n in fit] if len(fit) <= high - low else [],
                "DISKS": [chosen.parallel.nvme] if chosen.parallel.nvme else [],
                "BIN": str(Path(sys.executable).parent), "CODE": str(ROOT)}
    text = filled(TEMPLATE.read_text(), options, settings)
    if args.submit:
        _submit(text, folder)
    else:
        print(text, end="")


def _submit(text: str, folder: Path) -> None:
    script = folder / "slurm" / "train.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text)
    try:
        code = subprocess.run(["sbatch", f"--output={folder}/slurm/%x-%j.out", str(script)]).returncode
    except FileNotFoundError:
        raise ValueError(f"sbatch is not on this machine; submit {script} on a login node of the cluster") from None
    if code:
        asks = "; where Slurm counts no GPUs (generic resources), add --gpus 0" * ("\n#SBATCH --gpus-per-node" in text)
        raise ValueError(f"sbatch refused {script}, see above{asks}")
    print(f"its logs go to {script.parent}; once it has begun, stepladder status {folder} says where it stands")


def seconds(limit: str) -> int:
    """Of a time limit as Slurm spells it."""
    form = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", limit, re.ASCII)
    days, *rest = (int(number or 0) for number in form.groups()) if form else (0, 0, 0, 0)
    if form and not form[1] and not form[4]:      # minutes and perhaps seconds: with neither days nor both colons
        rest = [0, *rest[:2]]
    found = ((24 * days + rest[0]) * 60 + rest[1]) * 60 + rest[2]
    if not 0 < found <= YEAR:
        raise ValueError(f"--time {limit} must be a time above 0 and up to a year, as minutes, MM:SS, HH:MM:SS, D-HH, "
                         "D-HH:MM or D-HH:MM:SS, like 12:00:00 or 2-12")
    return found


def dealt(run: config.Run, low: int, high: int, per_node: int) -> list[int]:
    """The numbers of nodes, low and high among them, that the batch can be dealt to; ConfigError if these two are not.

    With nodes beyond the highest of them Slurm would give a job what it cannot use.
    """
    most = run.data.lanes * run.parallel.tp * run.parallel.pp          # processes: one reads a lane at least
    fit = [n for n in range(1, most // per_node + 1) if most % (n * per_node) == 0 and not _wrong(run, n, per_node)]
    for n in (low, high):
        if error := _wrong(run, n, per_node):
            raise ConfigError(_way_out(run, n, per_node, fit, error))
    return [n for n in fit if low <= n <= high]


def _wrong(run: config.Run, nodes: int, per_node: int) -> str:
    """Why the run would be refused on any machines of so many; empty if it would not."""
    try:
        rules.anywhere(run, nodes * per_node)
        world.refuse_far_copies(run, world.World(size=nodes * per_node, local_size=per_node))
    except ValueError as error:
        return str(error)
    return ""


def _way_out(run: config.Run, nodes: int, per_node: int, fit: list[int], error: str) -> str:
    """The sentence, with what was seen to help."""
    d, dp = run.data, nodes * per_node // (run.parallel.tp * run.parallel.pp)
    asked = f"--nodes {nodes} of {per_node} process{'es' * (per_node > 1)}"
    others = " or ".join([", ".join(map(str, fit[:-1]))] * (len(fit) > 1) + [str(n) for n in fit[-1:]])
    take = [f"take {others} node{'s' * (fit != [1])}"] * bool(fit)
    change = _change(run, nodes, per_node, dp) if dp else {}
    if not change or (d.lanes % dp == 0 and d.batch_tokens % (d.seq * d.rows * dp) == 0):
        return f"{asked}: {'; or '.join([error, *take])}"
    settings = "set " + " ".join(f"data.{key}={value}" for key, value in change.items())
    return (f"{asked}, dp = {dp}, cannot share out the batch: data.batch_tokens = {d.batch_tokens} must be a multiple "
            f"of data.seq x data.rows x dp = {d.seq} x {d.rows} x {dp}, and data.lanes = {d.lanes} one of dp; "
            f"{', or '.join([*take, settings])}")


def _change(run: config.Run, nodes: int, per_node: int, dp: int) -> dict[str, int]:
    """What to set of [data] so that its batch can be shared out: smaller pieces, or more and larger ones."""
    d = run.data
    lanes = -(-d.lanes // dp) * dp
    unit = d.seq * math.lcm(d.rows * dp, lanes)
    batch = -(-d.batch_tokens // unit) * unit
    for change in (*({"rows": rows} for rows in range(d.rows - 1, 0, -1)),
                   *({"lanes": lanes, "batch_tokens": batch + more * unit} for more in range(run.parallel.pp))):
        if not _wrong(replace(run, data=replace(d, **change)), nodes, per_node):
            return {key: value for key, value in change.items() if value != getattr(d, key)}
    return {}


def _excluded(folder: Path) -> list[str]:
    """The nodes that an earlier job of this run found unfit."""
    file = folder / "slurm" / "excluded"
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted({line.split()[0] for line in lines if line.strip()})


def filled(text: str, options: dict[str, str | None], settings: dict[str, str | list[str]]) -> str:
    """The script with other values. options: of #SBATCH, "" takes one out and None leaves it; settings: NAME=value."""
    for name, value in options.items():
        if value is not None:
            line = f"{'#' if value else '##'}SBATCH --{name}={shlex.quote(value) if value else 0}"
            text = _with(text, rf"#+SBATCH --{name}=\S+", line)
    for name, value in settings.items():
        word = f"({shlex.join(value)})" if isinstance(value, list) else shlex.quote(value)
        text = _with(text, rf"{name}=(?:\([^)]*\)|\S+)", f"{name}={word}")
    return text


def _with(text: str, pattern: str, line: str) -> str:
    """`text` with `line` for the only one like the pattern; a comment behind it stays where it is if there is room."""
    put = lambda m: f"{line.ljust(len(m[1]) - 1)} {m[2]}" if m[2] else line
    text, count = re.subn(rf"^({pattern} *)(#.*)?$", put, text, flags=re.MULTILINE)
    assert count == 1, f"{TEMPLATE} has {count} lines like {pattern}"
    return text
