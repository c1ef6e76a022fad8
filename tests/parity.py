"""Compares every model of the matrix with one rank, layout after layout, and writes what it found into the README."""
from __future__ import annotations

import argparse
import sys
import time

import matrix
import ranks
from test_parity import EXACT, worst

ranks.preload("test_parity")


def measure(name: str) -> float:
    """The largest relative error on a layout, all ranks and models; prints a line, and what is too large below it."""
    began, (parallel, n), models = time.perf_counter(), matrix.LAYOUTS[name], matrix.cells(name)
    answers = ranks.run(n, worst, models, parallel, timeout=1800)
    largest = max(error for error, _ in answers)
    print(f"{name:36} {n} ranks, {len(models):2} models: {largest:.0e} in {time.perf_counter() - began:3.0f} s",
          *sorted({line for _, lines in answers for line in lines})[:10], sep="\n    ", flush=True)
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layouts", nargs="*", help="as the table spells them; without any: all")
    parser.add_argument("--new", action="store_true", help="only layouts of which the README has no row, or an old one")
    args = parser.parse_args()
    if unknown := set(args.layouts) - set(matrix.LAYOUTS):
        parser.error(f"{min(unknown)!r} is no layout of the matrix; there are {', '.join(matrix.LAYOUTS)}")
    began, found = time.perf_counter(), matrix.recorded()
    names = args.layouts or [name for name in matrix.LAYOUTS if not (args.new and name in found)]
    wrong = 0
    for name in names:
        error = measure(name)
        wrong += not error < EXACT
        found[name] = f"{error:.0e}"
        matrix.record(found)
    print(f"{wrong} of {len(names)} layouts differ from one rank; {time.perf_counter() - began:.0f} s")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
