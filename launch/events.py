"""What befell a run: RUN/events.jsonl, and the marker RUN/unfinished.

The marker stands for as long as the run should be started again: from its first step until it is finished, stopped by
--steps-now, or failed by something that would fail again. A process that is killed has no time to leave one, so it is
there beforehand; whoever restarts jobs looks at it, not at exit codes, which launchers make up. A start that is refused
leaves the run as it was: its sentence is for whoever asked for it.

Why a run ended can be said by any rank, as rank 0 may be the one that hangs or dies. RUN/.untold lies there while none
has: who takes it away says it, the others are silent. A start that finds it knows that nobody had the time.
"""
from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE, MARKER, UNTOLD = "events.jsonl", "unfinished", ".untold"
STARTING = "cut off while it started\n"      # a marker that is this start's own


class Events:
    """The events of one run, for every rank to call; only rank 0 writes, except for faults."""

    def __init__(self, run: Path, rank: int) -> None:
        self.file, self.marker, self.untold = run / FILE, run / MARKER, run / UNTOLD
        self.rank, self.main = rank, rank == 0
        self.together = self.begun = False

    def begin(self) -> None:
        """Rank 0 holds the run folder; the other ranks may be anywhere."""
        if self.main:
            if self.untold.exists():
                self.add("fault", error="the start before this one ended without a word: it was killed, or its machine "
                                        "was lost")
            with contextlib.suppress(OSError):
                self.untold.touch()

    def started(self) -> None:
        """All ranks are there: the run should be started again, unless a better word follows."""
        self.together = True
        if self.main and not self.marker.exists():
            self._mark(STARTING)

    def begins(self, event: str, **facts: Any) -> None:
        """Nothing refused the start: from here on what happens happens to the run. event: start or resume."""
        self.begun = True
        self.goes_on("cut off")
        self.add(event, **facts)

    def add(self, event: str, **facts: Any) -> None:
        """One line: start, resume, signal, skip, unsaved, fault or end, and what is known about it."""
        if self.main:
            self._write(event, facts)

    def _write(self, event: str, facts: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):            # a full disk costs a line, never the run
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")

    def goes_on(self, why: str) -> None:
        """Leave or renew the marker: from here on the run should be started again if it ends, for the reason `why`."""
        if self.main:
            self._mark(f"{why}\n")

    def _mark(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.marker.write_text(text)

    def end(self, step: int, saved: bool, stopped: str) -> None:
        """The program comes to its end at `step`; `stopped` is the signal that asked for it."""
        self.add("end", step=step, saved=saved, **({"signal": stopped} if stopped else {}))
        if self.main:
            self.untold.unlink(missing_ok=True)
        if stopped or not saved:
            self.goes_on(f"stopped by {stopped} at step {step}" if stopped else f"step {step} was not saved")
        else:
            self.over()

    def over(self) -> None:
        """Take the marker away: starting the run again would do nothing, or fail again."""
        if self.main:
            self.marker.unlink(missing_ok=True)

    def fault(self, why: str, again: bool = True) -> None:
        """The run is over on this rank, for the reason `why`; again: another start may mend it."""
        if self.main or self.together:
            try:
                self.untold.unlink()
            except OSError:                           # another rank was the first
                return
            if again or self.begun:
                self._write("fault", {"rank": self.rank, "error": why})
            if not again and (self.begun or self._reads(STARTING)):
                self.marker.unlink(missing_ok=True)

    def _reads(self, text: str) -> bool:
        return self.marker.exists() and self.marker.read_text() == text

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Record what ends the run within."""
        try:
            yield
        except BaseException as error:
            ours = isinstance(error, ValueError) or type(error).__module__.startswith("stepladder.")
            self.fault(str(error) or type(error).__name__, again=not ours or getattr(error, "passing", False))
            raise


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run folder; a line that a killed run did not finish is left out."""
    found = []
    for line in (run / FILE).read_text(encoding="utf-8").splitlines() if (run / FILE).exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
