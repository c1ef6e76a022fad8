"""The curves of one or more runs as a PNG, read from their metrics.jsonl."""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

PANELS = (("loss", "loss (nats a token)"), ("grad_norm", "gradient norm"), ("lr", "learning rate"),
          ("tokens_per_s", "tokens a second"))


def run(args: argparse.Namespace) -> int:
    """stepladder plot RUN... [--out FILE]"""
    runs = [Path(path) for path in args.runs]
    out = Path(args.out or runs[0] / "curves.png")
    plot(runs, out)
    print(out)
    return 0


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw loss (also held out), gradient norm, learning rate and speed over tokens; dashed lines mark resumes."""
    histories = [(name, read(path)) for name, path in zip(names(runs), runs, strict=True)]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    for ax, (key, title) in zip(axes, PANELS, strict=True):
        for i, (name, records) in enumerate(histories):
            _draw(ax, records, key, name, f"C{i}")
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if key == "grad_norm":
            ax.set_yscale("log")
    for ax in axes[2:]:
        ax.set_xlabel("tokens")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[3].set_ylim(bottom=0)
    axes[0].legend(fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def names(runs: Sequence[Path]) -> list[str]:
    """Of each folder's path so much of the end as no other has."""
    paths = [path.resolve().parts for path in runs]
    return [next(str(Path(*p[-n:])) for n in range(1, len(p) + 1) if all(q == p or q[-n:] != p[-n:] for q in paths))
            for p in paths]


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no metrics.jsonl; name the folder of a run that has trained")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            records.append(record | {"tokens": int(record["tokens"])})
        except (ValueError, KeyError, TypeError):
            if not line.endswith("\n"):
                break
            raise ValueError(f"{path} line {number} is not a record with tokens; delete the line") from None
    if not records:
        raise ValueError(f"{path} has no records yet; wait for the first step")
    return records


def _draw(ax: Axes, records: list[dict[str, Any]], key: str, name: str, color: str) -> None:
    x = [record["tokens"] for record in records]
    y = [_number(record.get(key)) for record in records]
    smooth = key == "loss" and len(y) > 50
    ax.plot(x, y, color=color, alpha=0.3 if smooth else 1, linewidth=1, label=None if smooth else name)
    if smooth:
        ax.plot(x, _smoothed(y), color=color, linewidth=1.8, label=name)
    held_out = [(r["tokens"], r["eval_loss"]) for r in records if key == "loss" and r.get("eval_loss") is not None]
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o--", color=color, markersize=4, markerfacecolor="white",
                label=f"{name}, held out")
    resumed = [record["tokens"] for record in records if record.get("resumed")]
    for i, at in enumerate(resumed):
        ax.axvline(at, color=color, linestyle="--", linewidth=0.8, alpha=0.7,
                   label=f"{name}, resumed" if i == 0 else None)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value    # null: absent or not finite; a gap in the curve


def _smoothed(values: list[float]) -> np.ndarray:
    """The mean over a window around every point (a running mean would lag); gaps are skipped."""
    half = max(2, len(values) // 100)
    window = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, constant_values=np.nan), 2 * half + 1)
    known = ~np.isnan(window)
    return np.where(known, window, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)
