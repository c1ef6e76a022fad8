"""What befell a run: RUN/events.jsonl, and the marker RUN/unfinished.

The marker stands for as long as the run should be started again: from its first start until it is finished, stopped by
--steps-now, or failed by something that would fail again. A process that is killed has no time to leave one, so it is
there beforehand; whoever restarts jobs looks at it, not at exit codes, which launchers make up. A start that is refused
leaves the run as it was, with the marker of an older one: its sentence is for whoever asked for it, and a file that the
job's script names in STEPLADDER_REFUSED is for that script.

Why a run ended can be said by any rank, as rank 0 may be the one that hangs or dies. RUN/.untold lies there while none
has: who takes it away says it, the others are silent. A start that finds it knows that nobody had time. When nothing
has refused the start rank 0 renames it to RUN/.begun: whoever takes it then knows, however far it has come itself.
"""
from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE, MARKER, UNTOLD, BEGUN = "events.jsonl", "unfinished", ".untold", ".begun"
STARTING = "cut off while it started\n"      # a marker that is this start's own


class Events:
    """The events of one run, for every rank to call; only rank 0 writes, but for faults and skipped shards."""

    def __init__(self, run: Path, rank: int) -> None:
        self.file, self.marker, self.untold, self.begun = (run / name for name in (FILE, MARKER, UNTOLD, BEGUN))
        self.rank, self.main, self.together = rank, rank == 0, False

    def begin(self) -> None:
        """Rank 0 holds the run folder; the other ranks may be anywhere."""
        if self.main:
            if self._take():
                self.add("fault", error="the start before this one ended without a word: it was killed, or its machine "
                                        "was lost")
            with contextlib.suppress(OSError):
                self.untold.touch()

    def started(self) -> None:
        """All ranks are there: the run should be started again, unless a better word follows."""
        self.together = True
        if self.main and self.untold.exists() and not self.marker.exists():     # else it is over already
            self._mark(STARTING)

    def begins(self, event: str, **facts: Any) -> None:
        """Nothing refused the start: from here on what happens happens to the run. event: start or resume."""
        if self.main:
            try:
                self.untold.rename(self.begun)
            except OSError:                           # another rank has said why it is over
                return
        self.goes_on("cut off")
        self.add(event, **facts)

    def add(self, event: str, **facts: Any) -> None:
        """One line: start, resume, signal, skip, unsaved, fault or end, and what is known about it."""
        if self.main:
            self._write(event, facts)

    def left_out(self, step: int, shard: str) -> None:
        """A shard is skipped: said by the rank that reads it."""
        self._write("skip", {"rank": self.rank, "step": step, "shard": shard})

    def _write(self, event: str, facts: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):            # a full disk costs a line, never the run
            line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}).encode() + b"\n"
            with open(self.file, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    torn = file.read() != b"\n"           # a killed run did not finish its line
                    line = b"\n" * torn + line
                file.write(line)

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
            self._take()
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
            taken = self._take()
            if taken is None:                         # another rank was the first
                return
            begun, marked = taken == self.begun, self.marker.exists()
            if again or begun:
                self._write("fault", {"rank": self.rank, "error": why})
            if again and not (begun or marked):       # not all have come, or rank 0 has not come so far
                self._mark(STARTING)
            if not again and marked and (begun or self.marker.read_text() == STARTING):
                self.marker.unlink(missing_ok=True)

    def _take(self) -> Path | None:
        """The right to say why the run ended: the file that was taken away, if no other rank was the first."""
        for file in (self.untold, self.begun):        # in this order, as one becomes the other
            with contextlib.suppress(OSError):
                file.unlink()
                return file
        return None

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """Record what ends the run within."""
        try:
            yield
        except BaseException as error:
            self.fault(str(error) or type(error).__name__, _passing(error))
            raise


@contextlib.contextmanager
def refusals(file: str | None) -> Iterator[None]:
    """Leave `file`, for the script of a job that named it, when what is raised within would be raised again."""
    try:
        yield
    except BaseException as error:
        if file and not _passing(error):
            with contextlib.suppress(OSError):
                Path(file).touch()
        raise


def _passing(error: BaseException) -> bool:
    """Whether another start may mend it."""
    if isinstance(error, SystemExit):                 # of flags that argparse does not know
        return not error.code
    ours = isinstance(error, ValueError) or type(error).__module__.startswith("stepladder.")
    return not ours or getattr(error, "passing", False)


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run folder; a line that a killed run did not finish is left out."""
    found = []
    for line in (run / FILE).read_text(encoding="utf-8").splitlines() if (run / FILE).exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
