"""stepladder status: where a run stands, from its folder alone, while it runs or afterwards."""
from __future__ import annotations

import argparse
import json
import statistics
import time
import tomllib
from pathlib import Path
from typing import Any

from stepladder.launch import events
from stepladder.parallel.checkpoint_folder import CheckpointError, steps, verify

RECENT = 50                 # records, for the speed


def run(args: argparse.Namespace) -> None:
    """The program: `stepladder status`."""
    folder = Path(args.run)
    if not (folder / "config.toml").exists():
        raise ValueError(f"{folder} holds no run: it has no config.toml; give what train had as --folder")
    print("\n".join(f"{name:>12}  {text}" for name, text in said(folder, time.time()).items()))


def said(folder: Path, now: float) -> dict[str, str]:
    """What there is to say, by name."""
    last, tokens = _goal(folder / "config.toml")
    records, told = _records(folder / "metrics.jsonl"), events.read(folder)
    at, seen = (records[-1]["step"], records[-1]["tokens"]) if records else (0, 0)
    out = {"run": f"{folder}: {_state(folder, told, last)}", "step": f"{at} of {last}", "tokens": f"{seen:,}"}
    if records:
        out["step"] += f", {_ago(now - (folder / 'metrics.jsonl').stat().st_mtime)}"
        if records[-1].get("loss") is not None:
            out["loss"] = f"{records[-1]['loss']:.4f}"
        begun = max((i for i, r in enumerate(records) if "mesh" in r), default=0)     # of the last start
        speed = statistics.median(r["tokens_per_s"] for r in records[begun:])
        out["speed"] = f"{speed:,.0f} tokens/s"
        if at < last:
            out["left"] = _duration((last - at) * tokens / speed)
    starts = [e for e in told if e["event"] in ("start", "resume")]
    if starts:
        began = starts[-1]
        out["started"] = f"{_ago(now - began['time'])}, on {began['ranks']} ranks told by {began['launcher']}"
    out["restarts"] = str(sum(e["event"] == "resume" for e in told))
    out["checkpoint"] = _saved(folder / "checkpoints")
    if faults := [e for e in told if e["event"] in ("fault", "unsaved")]:
        since = sum(e in starts for e in told[told.index(faults[-1]):])
        later = f", {since} start{'s' * (since > 1)} since" if since else ""
        out["last error"] = f"{faults[-1]['error']} ({_ago(now - faults[-1]['time'])}{later})"
    return out


def _saved(folder: Path) -> str:
    """The newest checkpoint that is whole, and what is wrong with newer ones. Their bytes, which may be many, are left
    to the next start to compare."""
    wrong = []
    for path in steps(folder):
        try:
            verify(path, parts=0)
        except (OSError, CheckpointError) as error:
            wrong.append(f"; not {path.name}: {error}")
        else:
            return path.name + "".join(wrong)
    return "none" + "".join(wrong)


def _goal(file: Path) -> tuple[int, int]:
    """Steps of the run, tokens of a step."""
    try:
        config = tomllib.loads(file.read_text())
        return config["train"]["steps"], config["data"]["batch_tokens"]
    except (KeyError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} holds no run's configuration ({error!r}); train writes it anew") from None


def _state(folder: Path, told: list[dict[str, Any]], steps: int) -> str:
    """By the marker and the last event; a process that was killed had no time for either."""
    told = [e for e in told if e["event"] != "skip"]       # any rank's, perhaps after the end
    last, marker = told[-1]["event"] if told else "", folder / events.MARKER
    if last == "fault":
        return "failed; another start may mend it" if marker.exists() else "failed"
    if not marker.exists() and last == "end":
        return "finished" if (at := told[-1]["step"]) >= steps else f"stopped at step {at}, as --steps-now said"
    if not marker.exists():
        return "not begun"
    return marker.read_text().strip() if last == "end" else "running, or cut off"


def _records(path: Path) -> list[dict[str, Any]]:
    """The last whole records. A line is at most a few kilobytes."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - RECENT * 4096))
        lines = file.read().split(b"\n")[:-1]
    found = []
    for line in lines[-RECENT:]:
        try:
            found.append(json.loads(line))
        except ValueError:                 # the first may be half of one
            continue
    return found


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _ago(seconds: float) -> str:
    return f"{_duration(max(0.0, seconds))} ago"
