"""The parity matrix as data: which models are compared with one rank, on which layouts; and its table in the README."""
from __future__ import annotations

import re
from functools import cache
from itertools import combinations, product
from pathlib import Path

import tiny

from stepladder.parallel.support import LAYOUTS as SUPPORTED
from stepladder.parallel.support import Parallel, UnsupportedError, refuse

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(?<=<!-- stepladder parity -->\n).*?(?=\n<!-- end -->)", re.S)

Cell = tuple[str, str, str]                            # token mixer, channel mixer, wiring
TOKENS = tiny.CROSSED                                  # attention0 has 2 kv heads, attention1 has one and a window
CHANNELS = [*tiny.CHANNELS, "between"]                 # moe1 is pre-gated; "between": dense blocks between
WIRINGS = [*tiny.LAGS, "mixed"]
CELLS: list[Cell] = list(product(TOKENS, CHANNELS, WIRINGS))


def layout(features: frozenset[str]) -> tuple[Parallel, int]:
    """A supported layout at two ranks a dimension (HSDP needs two by two), and its world size."""
    pipe = next((s for s in ("interleaved", "zero-bubble") if s in features), "1f1b")
    tp, pp = 1 + ("tp" in features), 1 + (pipe != "1f1b" or "pp" in features)
    dp = 4 if "hsdp" in features else 2 if {"fsdp", "ddp"} & features else 1
    parallel = Parallel(tp=tp, pp=pp, schedule=pipe, ep=1 + ("ep" in features), dp_replicate=1 + ("hsdp" in features),
                        sequence="sp" in features, shard="ddp" not in features)
    assert parallel.features(dp) == features
    return parallel, tp * pp * dp


def spell(p: Parallel, ranks: int) -> str:
    """A layout in words: tp2 sp x pp2 x ep2 x fsdp2."""
    dp = ranks // (p.tp * p.pp)
    data = f"{'fsdp' if p.shard else 'ddp'}{dp}"
    if p.dp_replicate > 1:
        data = f"hsdp{p.dp_replicate}x{dp // p.dp_replicate}"
    pipe = "" if p.schedule == "1f1b" else f" {p.schedule}"
    parts = {f"tp{p.tp}{' sp' if p.sequence else ''}": p.tp > 1, f"pp{p.pp}{pipe}": p.pp > 1, f"ep{p.ep}": p.ep > 1,
             f"{data}{'' if p.reshard else ' kept'}{' offloaded' if p.offload else ''}": dp > 1}
    return " x ".join(part for part, used in parts.items() if used)


# Layouts on which every model is compared; on the others that the support table lists a few, see selection().
WHOLE = [
    (Parallel(tp=2), 2), (Parallel(tp=4), 4), (Parallel(tp=2, sequence=True), 2), (Parallel(tp=4, sequence=True), 4),
    (Parallel(pp=2), 2), (Parallel(pp=4), 4), (Parallel(pp=2, schedule="interleaved"), 2),
    (Parallel(pp=2, schedule="zero-bubble"), 2), (Parallel(ep=2), 2), (Parallel(ep=4), 4), (Parallel(), 2),
    (Parallel(dp_replicate=2), 4), (Parallel(tp=2, pp=2), 4), (Parallel(tp=2, sequence=True, ep=2), 2),
    (Parallel(pp=2, ep=2), 4), (Parallel(tp=2, pp=2), 8), (Parallel(tp=2, sequence=True, pp=2, ep=2), 8)]
LARGER = [                                       # than two ranks a dimension, or with another switch
    (Parallel(), 3), (Parallel(), 4), (Parallel(reshard=False), 2), (Parallel(offload=True), 2),
    (Parallel(tp=2, sequence=True, ep=2, offload=True), 4), (Parallel(tp=2, sequence=True, ep=4), 4),
    (Parallel(tp=4, shard=False), 8), (Parallel(pp=4, schedule="interleaved"), 4),
    (Parallel(pp=4, schedule="zero-bubble"), 4)]
LAYOUTS: dict[str, tuple[Parallel, int]] = {     # name -> layout, ranks
    spell(*made): made for made in [*WHOLE, *LARGER, *(layout(features) for features in SUPPORTED
                                                 if features - {"zero"})]}


@cache
def allowed(name: str) -> list[Cell]:
    """Every model that the support table has nothing against on a layout."""
    parallel, ranks = LAYOUTS[name]
    return [cell for cell in CELLS if _allowed(cell, parallel, ranks // (parallel.tp * parallel.pp))]


def _allowed(cell: Cell, parallel: Parallel, dp: int) -> bool:
    try:
        refuse(tiny.config(*cell), parallel, dp)
    except UnsupportedError:
        return False
    return True


def pairs(name: str, cell: Cell) -> set[tuple[object, ...]]:
    """What one comparison covers: every two of its layout, token mixer, channel mixer and wiring."""
    return set(combinations(enumerate((name, *cell)), 2))


@cache
def selection() -> dict[str, list[Cell]]:
    """A few models a layout that together cover every pair there is. Greedy, always the same."""
    wanted = {pair for name in LAYOUTS for cell in allowed(name) for pair in pairs(name, cell)}
    chosen: dict[str, list[Cell]] = {name: [] for name in LAYOUTS}
    for at, (name, few) in enumerate(chosen.items()):
        models = allowed(name)
        turn = at % len(models)                                  # ties go to other models on every layout
        covers = {cell: pairs(name, cell) & wanted for cell in models[turn:] + models[:turn]}
        while any(pair[0] == (0, name) for pair in wanted):
            few.append(max(covers, key=lambda cell: len(covers[cell])))
            wanted -= covers[few[-1]]
            covers = {cell: found - covers[few[-1]] for cell, found in covers.items()}
    return chosen


def suite() -> dict[str, list[Cell]]:
    """The selection's layouts that two cores can have many of."""
    return {name: few for name, few in selection().items() if LAYOUTS[name][1] <= 8}


def cells(name: str) -> list[Cell]:
    """The models that `make parity` compares on a layout."""
    return allowed(name) if LAYOUTS[name] in WHOLE else selection()[name]


def row(name: str) -> str:
    return f"| {name} | {LAYOUTS[name][1]} | {len(cells(name))} | {len(suite().get(name, []))} |"


def table(found: dict[str, str]) -> str:
    """The parity table; `found` is the largest relative error of each layout that was run."""
    n, few = sum(len(cells(name)) for name in LAYOUTS), sum(map(len, suite().values()))
    return "\n".join([
        f"{n} comparisons on {len(LAYOUTS)} layouts; {few} of them, in `make test`, cover every pair of token mixer, "
        "channel mixer, wiring and layout.", "", "<details><summary>Layout by layout</summary>", "",
        "| layout | ranks | models | in the suite | largest relative error |", "|---|---|---|---|---|",
        *(f"{row(name)} {found[name]} |" for name in LAYOUTS if name in found), "", "</details>"])


def recorded() -> dict[str, str]:
    """Layout -> largest error, of the README's rows that tell of the matrix as it is now."""
    lines, rows = README.read_text().splitlines(), {row(name): name for name in LAYOUTS}
    return {rows[head]: line.removeprefix(head).strip(" |") for line in lines for head in rows
            if line.startswith(f"{head} ")}


def record(found: dict[str, str]) -> None:
    README.write_text(MARKED.sub(lambda _: table(found), README.read_text()))
