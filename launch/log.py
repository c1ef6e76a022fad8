"""What a run says: RUN/metrics.jsonl with one object a step, TensorBoard, and a console line that a person can read."""
from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from torch.utils.tensorboard import SummaryWriter
except Exception as error:    # missing: ImportError; but a protobuf of another version raises TypeError and others
    SummaryWriter, MISSING = None, f"{type(error).__name__}: {error}"

TAGS = {
    "loss": "loss/train", "eval_loss": "loss/heldout", "lr": "optimizer/lr", "grad_norm": "optimizer/grad_norm",
    "skipped": "optimizer/skipped", "tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu",
    "data_wait": "speed/data_wait", "memory_gib": "speed/memory_gib",
}
LAYERS = {"load": "router/load", "entropy": "router/entropy"}    # lists: one value a MoE layer


FLUSH = 10      # seconds until TensorBoard's thread writes, and finds that it cannot; its own 120 outlast short runs


class Log:
    """The log of one run, for every rank to call; only the `main` one writes.

    `step` is the step the run resumes from: what was recorded after it is dropped, so that every step stands in the
    file once. `every` thins out the console lines, not the records.
    """

    def __init__(self, run: Path, *, main: bool, total_steps: int, step: int = 0, every: int = 1) -> None:
        self.main, self.total, self.every = main, total_steps, every
        self.tty = main and sys.stdout.isatty()
        self.resumed = step > 0
        self.full: set[Path] = set()                               # what could not be written at the last record
        self.open = False                                          # the cursor stands behind a progress line
        self.seen: deque[tuple[int, float]] = deque(maxlen=50)     # (step, time), for the time left
        self.board = None
        if not main:
            return
        self.run = run
        run.mkdir(parents=True, exist_ok=True)
        _rewind(run / "metrics.jsonl", step)
        self.file = open(run / "metrics.jsonl", "a", buffering=1, encoding="utf-8")    # noqa: SIM115 closed by close()
        self.hook, threading.excepthook = threading.excepthook, self._uncaught
        if SummaryWriter is None:
            self.note(f"no TensorBoard logs: package tensorboard does not load ({MISSING}); pip install tensorboard "
                      f"brings it, and metrics.jsonl and stepladder plot work without it")
        else:
            try:
                self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, flush_secs=FLUSH)
            except OSError as error:
                self.note(f"no TensorBoard logs: {error}; the run goes on without, and so does metrics.jsonl")

    def step(self, record: dict[str, Any]) -> None:
        """Record one step: step, tokens and skipped (so far), loss, eval_loss, lr, grad_norm, tokens_per_s, mfu,
        memory_gib (of the rank that took most), data_wait (a share), load and entropy (lists). All but step may be
        missing or 0-d tensors."""
        if not self.main:
            return
        record = {name: _plain(value) for name, value in record.items()}
        if self.resumed:
            record["resumed"], self.resumed = True, False    # plots mark it
        self._write(record)
        self._print(record)

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.main:
            say(text)

    def _uncaught(self, told: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread keeps the error that ends it for the next call, which tells it: no traceback."""
        if not (isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard.")):
            self.hook(told)

    def close(self) -> None:
        """Flush everything; the log is done."""
        if not self.main:
            return
        if self.open:
            put("")    # keep the last progress line
        try:
            self.file.close()
            if self.board:
                self.board.close()
        except OSError as error:
            self.note(f"the last records are lost: {error}")
        threading.excepthook = self.hook

    def _write(self, record: dict[str, Any]) -> None:
        """A full disk costs records, never the run."""
        with self._lossy(self.run / "metrics.jsonl"):
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
        if self.board:
            with self._lossy(self.run / "tensorboard"):
                for tag, value in _scalars(record):
                    self.board.add_scalar(tag, value, record["step"])

    @contextlib.contextmanager
    def _lossy(self, path: Path) -> Iterator[None]:
        """Say once that `path` cannot be written, until it can be again."""
        try:
            yield
            self.full.discard(path)
        except OSError as error:
            if path not in self.full:
                self.note(f"{path} cannot be written ({error}); training goes on without its records")
            self.full.add(path)

    def _print(self, record: dict[str, Any]) -> None:
        step, kept = record["step"], "eval_loss" in record    # a line that the next one does not replace
        self.seen.append((step, time.monotonic()))
        if not (self.tty or kept or step % self.every == 0 or step == self.total or len(self.seen) == 1):
            return
        text = "  ".join([f"{step:>{len(str(self.total))}}/{self.total}", f"{self._eta():>5} left", *_parts(record)])
        if not self.tty:
            put(text)
            return
        columns, done = shutil.get_terminal_size().columns, 20 * step // self.total
        bar = f"[{'#' * done}{'.' * (20 - done)}] "
        text = bar + text if len(bar) + len(text) < columns else text[:columns - 1]
        put(f"\r{text}\x1b[K", end="\n" if kept else "")
        self.open = not kept

    def _eta(self) -> str:
        """Hours, minutes and seconds, from the last fifty records."""
        (first, began), (last, now) = self.seen[0], self.seen[-1]
        if last == first:
            return "-:--"
        minutes, seconds = divmod(round((now - began) / (last - first) * (self.total - last)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def say(text: str) -> None:
    """A line of its own, instead of a progress line."""
    put(f"\r\x1b[K{text}" if sys.stdout.isatty() else text)


def put(text: str, end: str = "\n") -> None:
    """To the console. Where nobody reads on (of `train | tee` the same Ctrl-C ends tee), or a disk is full, the run
    goes on without."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # or Python would fail at its end


def _rewind(path: Path, step: int) -> None:
    """Drop the records after `step`, and the line that a killed run did not finish."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(temporary)) from None


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    """`value` as JSON can say it: NaN and the infinities are null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return float(value) if math.isfinite(value) else None


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    found = [(tag, record.get(name)) for name, tag in TAGS.items()]
    for name, tag in LAYERS.items():
        found += [(f"{tag}/{i}", value) for i, value in enumerate(record.get(name) or [])]
    return [(tag, value) for tag, value in found if value is not None]


def _parts(record: dict[str, Any]) -> list[str]:
    """The pieces of a console line; a missing number is left out, a non-finite loss or gradient is said."""
    def said(name: str, form: str) -> str:
        return "not finite" if record[name] is None else format(record[name], form)

    parts = [f"{label} {said(name, form)}" for name, label, form in (
        ("loss", "loss", ".4f"), ("eval_loss", "heldout", ".4f"), ("grad_norm", "grad", ".2f")) if name in record]
    if record.get("tokens_per_s") is not None:
        parts.append(f"{_short(record['tokens_per_s'])} tok/s")
    for name, label in (("mfu", "MFU"), ("data_wait", "wait")):
        if record.get(name) is not None:
            parts.append(f"{label} {record[name]:.1%}")
    loads = [x for x in record.get("load") or [] if x is not None]
    if loads:
        parts.append(f"load {max(loads):.2f}")
    if record.get("skipped"):
        parts.append(f"skipped {record['skipped']}")
    return parts


def _short(number: float) -> str:
    for scale, unit in ((1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.1f}{unit}"
    return f"{number:.0f}"
