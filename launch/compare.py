"""stepladder compare: what runs differ in, where their losses part, and their curves over each other."""
from __future__ import annotations

import argparse
import statistics
import tomllib
from pathlib import Path

from stepladder.launch import events, plot
from stepladder.launch.toml import differing, flat

WIDTH = 34                  # characters of a value
STARTED = ("ranks", "mesh", "device", "torch", "code", "data")        # of an event start or resume


def run(args: argparse.Namespace) -> None:
    """The program: `stepladder compare`."""
    runs = [Path(path) for path in args.runs]
    if len(runs) < 2:
        raise ValueError(f"{runs[0]} alone compares with nothing; name another run, or look at it with stepladder plot")
    out = Path(args.out or runs[0] / "compared.png")
    told = [_Run(path) for path in runs]
    names = plot.names(runs)
    print(_table("", names, results(told)))
    for name, other in zip(names[1:], told[1:], strict=True):
        print(f"{name}: {parting(told[0], other)}" if len(told) > 2 else parting(told[0], other))
    print()
    rows = differences(told)
    print(_table("differs", names, rows) if rows else "no setting differs")
    for name, one in zip(names, told, strict=True):
        print("".join(f"{name}: {text}\n" for text in changes(one)), end="")
    plot.plot(runs, out)
    print(f"\n{out}")


class _Run:
    """What a run folder says."""

    def __init__(self, path: Path) -> None:
        self.path, self.records, self.told = path, plot.read(path), events.read(path)
        if not (path / "config.toml").is_file():
            raise ValueError(f"{path} has no config.toml; name the folder of a run that has trained")
        try:
            self.config = flat(tomllib.loads((path / "config.toml").read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path / 'config.toml'} is torn ({error}); a resume of the run writes it anew") from None
        self.losses = {r["step"]: r["loss"] for r in self.records if r.get("loss") is not None}


def results(runs: list[_Run]) -> list[tuple[str, list[str]]]:
    """How far each has come, and how well: rows of a table."""
    last = [r.records[-1] for r in runs]
    shared = max(set.intersection(*({*r.losses} for r in runs)), default=None)
    held_out = [[r["eval_loss"] for r in run.records if r.get("eval_loss") is not None] for run in runs]
    rows = [("step", [f"{at['step']} of {r.config['train.steps']}" for at, r in zip(last, runs, strict=True)]),
            ("tokens", [f"{at['tokens']:,}" for at in last])]
    if shared is not None:
        before = [[loss for step, loss in r.losses.items() if shared - 50 < step <= shared] for r in runs]
        rows += [(f"loss at step {shared}", [f"{r.losses[shared]:.4f}" for r in runs]),
                 (f"  mean of {min(50, shared)} steps", [f"{statistics.fmean(few):.4f}" for few in before])]
    speed = [statistics.median(r["tokens_per_s"] for r in run.records) for run in runs]
    rows += [("held out", [f"{losses[-1]:.4f}" if losses else "-" for losses in held_out]),
             ("tokens/s, median", [f"{each:,.0f}" for each in speed]),
             ("restarts", [str(sum(e["event"] == "resume" for e in r.told)) for r in runs]),
             ("faults", [str(sum(e["event"] == "fault" for e in r.told)) for r in runs])]
    return rows


def parting(first: _Run, other: _Run) -> str:
    """Where the losses of a run first differ from the first run's, bit by bit."""
    shared = sorted({*first.losses} & {*other.losses})
    if not shared:
        return "no step has a loss in both of them"
    apart = [step for step in shared if other.losses[step] != first.losses[step]]
    if not apart:
        return f"losses are equal, bit by bit, at all {len(shared)} steps that they share"
    by = f"{max(abs(other.losses[s] / first.losses[s] - 1) for s in apart):.1g} of themselves at most"
    if apart[0] == shared[0]:
        return f"losses differ from step {apart[0]} on, by {by}"
    return f"losses are equal before step {apart[0]}, and differ by {by} from there on"


def differences(runs: list[_Run]) -> list[tuple[str, list[str]]]:
    """Settings, and what was there at the last start, where they are not all the same."""
    starts = [next((e for e in reversed(r.told) if e["event"] in ("start", "resume")), {}) for r in runs]
    tables = [{key: start[key] for key in STARTED if key in start} | r.config
              for start, r in zip(starts, runs, strict=True)]
    return differing(tables)


def changes(one: _Run) -> list[str]:
    """What a run was trained with from some step on, and before with something else: the table has the last of it."""
    return [f"from step {e['step'] + 1} on {', '.join(f'{key} {a} -> {b}' for key, (a, b) in e['changed'].items())}"
            for e in one.told if e.get("changed") and one.records[-1]["step"] > e["step"]]


def _table(head: str, names: list[str], rows: list[tuple[str, list[str]]]) -> str:
    left = max(len(head), *(len(name) for name, _ in rows))
    cut = [(head, names), *(
        (name, [v if len(v) <= WIDTH else f"{v[:WIDTH - 3]}..." for v in values]) for name, values in rows)]
    widths = [max(len(v) for v in column) for column in zip(*(values for _, values in cut), strict=True)]
    return "\n".join("  ".join([name.ljust(left), *(v.ljust(w) for v, w in zip(values, widths, strict=True))]).rstrip()
                     for name, values in cut)
