"""What following collectives and keeping the log cost a step: the program itself, some of whose steps do without.

    python tests/bench/overhead.py RUN.toml NEW_FOLDER [section.key=value ...]           # one process: the log alone
    torchrun --nproc-per-node 2 tests/bench/overhead.py RUN.toml NEW_FOLDER parallel.tp=2

Ten steps with both, ten without the one, ten without the other, and so on: what slows a machine slows all three. A step
lasts from its call to the call of the next, which waits for the step before; the first three of ten are not counted.
"""
from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from statistics import median, quantiles
from typing import Any

from stepladder.launch import cli, train
from stepladder.parallel.watch import watch

KINDS = "both", "no watchdog", "no log"
BLOCK, SKIPPED = 10, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("folder")
    parser.add_argument("change", nargs="*", help="section.key=value")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_intermixed_args()
    took: dict[str, list[float]] = defaultdict(list)
    began, kind, tell, ranks = time.perf_counter(), KINDS[0], True, 1
    step, record, number = train.train_step, train.Trainer._record, itertools.count()

    def stepped(parts: Any, *more: Any) -> Any:
        nonlocal began, kind, tell, ranks
        now, n = time.perf_counter(), next(number)
        if n % BLOCK > SKIPPED or (n and n % BLOCK == 0):
            took[kind].append(now - began)
        began, kind, tell, ranks = now, KINDS[n // BLOCK % len(KINDS)], parts.mesh.rank == 0, parts.mesh.size
        watch.on = ranks > 1 and kind != "no watchdog"
        return step(parts, *more)

    def recorded(self: train.Trainer, late: Any, evaluate: bool = False) -> None:
        late.read() if kind == "no log" else record(self, late, evaluate)

    train.train_step, train.Trainer._record = stepped, recorded
    code = cli.main(["train", args.run, "--folder", args.folder, "--steps-now", str(args.steps), "checkpoint.every=0",
                     *args.change])
    if tell and code == 0:
        both = median(took["both"])
        print(f"a step: {1e3 * both:.2f} ms, quartiles {', '.join(f'{1e3 * q:.2f}' for q in quantiles(took['both']))}")
        for kind in KINDS[2 - (ranks > 1):]:
            less = both - median(took[kind])
            print(f"{kind}: {1e3 * less:+.2f} ms less, {100 * less / both:.2f} % of a step")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
