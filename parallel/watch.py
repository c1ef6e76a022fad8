"""Names what a run hangs on. A thread on every rank follows its collectives and tells the others, through the store,
how far it is; what takes longer than the limit ends the process with a sentence about who did not come.

The rest of the code calls `watch.track` for each collective it starts, `watch.note` for those whose handles others have
(FSDP's, a pipeline's), and `watch.step` for each step; outside `over` they do nothing. What nobody tracks is covered by
the step: no progress for as long as the limit is a hang, too.
"""
from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from stepladder.parallel.mesh import Mesh

EXIT = 70              # EX_SOFTWARE of sysexits.h
HELD = 4               # collectives watched at once: a handle keeps its output in memory
NAMES = 4096           # collectives whose names are remembered, to say between which two a hang is
BEAT = 2.0             # seconds between two words to the store; less where the limit is short
QUICK = 0.3            # seconds between them once somebody is gone
NEWS = 0.2             # seconds until a step that has begun is told as well, and an alarm heard; more of many ranks
WORDS = 5000           # a second, of all ranks, that the store is to hear at most
LISTEN = 3             # beats until a rank that says nothing is called silent
SURE = 1.0             # seconds until one that is, alone among the others, is called gone when a connection broke
TELL = 5.0             # seconds to say why before the end
HOUSE = str(Path(__file__).parents[1])


def listed(ranks: Sequence[int]) -> str:
    """rank 3; ranks 1 and 3; ..."""
    names = [*map(str, ranks[:8]), *([f"{len(ranks) - 8} more"] if len(ranks) > 8 else [])]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _in(step: int) -> str:
    """Where a rank stands. It counts from the first step of this program, whatever the run has made before."""
    return f"in step {step}" if step else "before its first step"


class LostRank(RuntimeError):
    """The group is broken: another rank is gone, or left."""
    exit = EXIT            # of the program
    passing = True         # started again, it may well run


class Process(NamedTuple):
    """Of a machine since its start, and of the namespaces in which its number and its time mean it."""
    home: str                # nothing where /proc does not tell
    pid: int
    born: int                # in ticks of the machine: numbers are used again

    @staticmethod
    def this() -> Process:
        pid = os.getpid()
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time")
                      if kind == "pid" or os.path.lexists("/proc/self/ns/time")]       # since Linux 5.6
            born = _born(pid)
            if os.readlink("/proc/self") == str(pid) and born:       # else /proc is that of another namespace
                return Process(" ".join([os.uname().nodename, boot, *spaces]), pid, born)
        return Process("", pid, 0)

    def ended(self, home: str) -> bool:
        """It is one of `home`, and no more."""
        return self.home == home != "" and _born(self.pid) not in (self.born, None)


def _born(pid: int) -> int | None:
    """0 for a process that is not, or that has ended and whose parent has not asked yet; None: not known."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()      # a name may be anything
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except OSError:                                   # no descriptor is left
        return None
    return 0 if state in (b"Z", b"X") else int(rest[18])


class Word(NamedTuple):
    """What a rank last said of itself. One whose beats stop is gone: the process, or the machine."""
    beat: int
    time: float
    step: int
    started: int             # collectives, since the beginning
    stands: str              # at which collective, and where in the source
    process: Process


class Watch:
    """This process's watchdog; `watch` is the one there is."""

    def __init__(self) -> None:
        self.on = self.leaving = self.rests = self.alarmed = False
        self.started = 0
        self.runs = 0                          # of this process: a store outlives them
        self.tell: Callable[[str], None] = lambda why: None

    @contextlib.contextmanager
    def over(self, mesh: Mesh, store: dist.Store, limit: float,
             tell: Callable[[str], None] = lambda why: None) -> Iterator[None]:
        """Watch what happens within. `store` is one that all ranks know; `limit` is in seconds. `tell` hears why, too,
        before the process is ended."""
        self.tell = tell
        self.start(mesh, store, limit)
        try:
            yield
        except Exception as error:
            self.leaving = True
            if (cause := self._cause(error)) is None:
                self.stop(f"{self._rank(mesh.rank)} stopped: {error}")
                raise
            self.stop(cause)
            raise LostRank(f"{self._rank(mesh.rank)} lost the others {_in(self.now)}{self._last()}: {cause}"
                           ) from error
        finally:
            self.stop(f"{self._rank(mesh.rank)} has come to its end", alarm=False)

    def start(self, mesh: Mesh, store: dist.Store, limit: float) -> None:
        self.mesh, self.limit, self.pause = mesh, limit, min(BEAT, limit / 10)
        self.now, self.told, self.started, self.complete, self.beats = 0, 0, 0, 0, 0
        self.names = [("", "")] * NAMES
        self.held: deque[tuple[int, float, dist.Work]] = deque()
        self.runs += 1
        self.process = Process.this()          # that which imported this may be its parent
        own = store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # the main thread may wait in the other
        self.store = dist.PrefixStore(f"watch/{self.runs}", own)
        self.store.set_timeout(timedelta(seconds=max(10.0, self.pause)))
        self.ended, self.heard = threading.Event(), time.monotonic()
        self.on, self.leaving, self.rests, self.alarmed = True, False, False, False
        self._say()
        self.thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self.thread.start()
        threading.Thread(target=self._guard, args=(self.ended,), name="guard", daemon=True).start()

    def stop(self, why: str, alarm: bool = True) -> None:
        """Leave, and say why to those that may come to wait for this rank. alarm: they will wait in vain."""
        if self.on:
            self.on = False
            self.ended.set()
            self.thread.join()
            if not alarm:                      # that its process ends means nothing any more
                self.process = Process("", 0, 0)
            self._leave(why, alarm)
            self.held.clear()

    def track(self, work: dist.Work, kind: str, where: str) -> dist.Work:
        """Remember a collective, like ("all-reduce", "blocks.3.token"), until it is complete."""
        if self.on:
            n = self.note(kind, where)
            if len(self.held) == HELD and self.held[0][2].is_completed():
                self.complete = self.held.popleft()[0]
            if len(self.held) < HELD:
                self.held.append((n, time.monotonic(), work))
        return work

    def note(self, kind: str, where: str = "") -> int:
        """Remember by name alone what begins now; its number."""
        if self.on:
            self.started += 1
            self.names[self.started % NAMES] = kind, where
        return self.started

    def forget(self, started: int) -> None:
        """What began after number `started` was this rank's alone, and is complete: numbers of ranks are compared."""
        if self.on:
            self.started, self.complete = started, min(self.complete, started)
            self.held = deque(h for h in self.held if h[0] <= started)

    def step(self, step: int) -> None:
        """Step `step` begins."""
        if self.on:
            self.now = step
            while self.held and self.held[0][2].is_completed():
                self.complete = self.held.popleft()[0]

    @contextlib.contextmanager
    def rest(self) -> Iterator[None]:
        """No step is under way: a slow disk is no hang. Collectives that are tracked stay watched."""
        self.rests = True
        try:
            yield
        finally:
            self.rests = False

    def suspect(self, ranks: Sequence[int]) -> None:
        """These do not answer. Those that do not beat either are gone: an alarm, where no connection may ever break.

        Nothing else speaks against them, so they are listened to twice as long: a rank that holds its interpreter, in
        AdamW on the host for one, says nothing meanwhile. That a process of this machine has ended is known at once,
        also of ranks that nobody here has asked.
        """
        if self.on:
            with contextlib.suppress(RuntimeError):
                mesh = self.mesh
                near = range(mesh.size)[mesh.rank - mesh.rank % (n := mesh.local or mesh.size):][:n]
                before = self._read([r for r in {*near, *ranks} if r in ranks or self.store.check([str(r)])])
                silent, words = self._dead(before), before
                if not silent and not self.ended.wait(2 * LISTEN * self.pause):
                    words = self._read(ranks)
                    silent = self._silent(before, words)
                if silent:
                    self._leave(self._gone(silent, words))

    # What follows may run in either thread. Only training changes `held`: the main thread or autograd's, never both.

    def _follow(self) -> None:
        seen, moved = None, time.monotonic()
        while self._beat():
            waits, time_ = self._oldest(), time.monotonic()
            self.heard = time_
            state = self.now, self.started, waits and waits[0]
            if state != seen or self.rests:
                seen, moved = state, time_
            waited = time_ - min(moved, waits[1] if waits else moved)
            try:
                self._say()
                # After an alarm nobody gets far; what still moves, or rests, comes to a broken connection by itself.
                limit = self.pause if self.alarmed else self.limit - LISTEN * self.pause
                if waited > limit and not self.leaving:
                    cause, again = self._others(), self._oldest()
                    # It has neither gone on in the meantime nor begun to rest.
                    if state == (self.now, self.started, again and again[0]) and not self.rests:
                        self._end(cause, time.monotonic() - time_ + waited)
            except RuntimeError as error:
                if waited > self.limit:
                    self._end(f"nor is there a word from the store, at rank 0 or its launcher: {error}", waited)

    def _beat(self) -> bool:
        """Wait for the next beat, which an alarm brings forward, with a word about each step that begins before it;
        False when the watch is over."""
        began = time.monotonic()
        while (left := began + self._pause() - time.monotonic()) > 0:
            if self.ended.wait(min(left, max(NEWS, self.mesh.size / WORDS))):
                return False
            with contextlib.suppress(RuntimeError):          # the beat's own word finds out too
                if self.now != self.told:
                    self._say()
                self.alarmed = self.alarmed or self.store.check(["alarm"])
        return True

    def _pause(self) -> float:
        """Seconds from this beat to the next."""
        return min(self.pause, max(QUICK, self.mesh.size / WORDS)) if self.alarmed else self.pause

    def _guard(self, ended: threading.Event) -> None:
        """Where the network is cut the store neither answers nor fails: then the thread that asks it hangs as well."""
        while not ended.wait(self.pause):
            silent = time.monotonic() - self.heard
            if silent > self.limit + max(10.0, LISTEN * self.pause) and not self.rests:
                self._end("the store, at rank 0 or its launcher, does not answer", silent)

    def _end(self, cause: str, waited: float) -> None:
        waits, me = self._oldest(), self._rank(self.mesh.rank)
        what = f"for {self._range(waits[0])}" if waits else f"without progress{self._last()}"
        if self.ended.is_set() or self.leaving:
            return
        why = f"{me} waited {waited:.0f} s {_in(self.now)} {what}: {cause}"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"stepladder: {why}\n".encode())
        for say, words in ((self._leave, cause), (self.tell, why)):
            saying = threading.Thread(target=say, args=(words,), daemon=True)
            saying.start()
            saying.join(TELL)                  # the network, or the disk, may be what hangs
        os._exit(EXIT)

    def _leave(self, why: str, alarm: bool = True) -> None:
        with contextlib.suppress(RuntimeError):        # nobody may be left to hear it
            self._say()
            self.store.compare_set("left", "", why)    # the first: what others say follows from it
            if alarm:
                self.store.add("alarm", 1)

    def _cause(self, error: Exception) -> str | None:
        """Whose end this error of a connection comes from; None for any other error."""
        text = str(error)
        if not isinstance(error, RuntimeError) or not ("gloo" in text or "onnection" in text or "NCCL" in text):
            return None
        try:
            # Not a time-out: somebody is gone, or going. The first to find out judges, for the others to say the same.
            self.alarmed = "onnection" in text and "imed out" not in text
            return self._others(judge=self.alarmed and self.store.add("alarm", 1) == 1)
        except RuntimeError as lost:
            return f"the store, at rank 0 or its launcher, is gone too: {lost}"

    def _others(self, judge: bool = False) -> str:
        """Which rank is to blame: what the first that left says, else whose beats have stopped, else who is behind.

        Not to beat for a while proves nothing, a rank may hold the interpreter's lock or wait for its core; but when
        one is known to be gone and all others were heard since, it is the one: so a `judge` need not listen long."""
        before, began = self._read(), time.monotonic()
        while True:
            self.ended.wait(self._pause())
            self._say()                        # the others may be listening, too
            if self.store.check(["left"]):
                return self.store.get("left").decode()
            listened = time.monotonic() - began
            over = listened >= LISTEN * self.pause or self.ended.is_set()
            if over or judge:
                words = self._read()
                silent = self._silent(before, words)
                if over or (len(silent) == 1 and listened >= SURE):
                    break
            if silent := self._dead(before):           # where no connection breaks either
                words = self._read()
                break
        if silent:
            return self._gone(silent, words)
        if behind := self._behind(words):
            return self._list(behind, lambda r: f"never came, it is {_in(words[r].step)}{words[r].stands}")
        places: dict[str, list[int]] = defaultdict(list)
        for rank, word in words.items():
            places[f"{_in(word.step)}{word.stands}"].append(rank)
        return "; ".join(f"{listed(ranks)} {place}" for place, ranks in [*places.items()][:4])

    def _silent(self, before: dict[int, Word], words: dict[int, Word]) -> list[int]:
        return [r for r, word in words.items() if word.beat == before[r].beat and r != self.mesh.rank]

    def _dead(self, words: dict[int, Word]) -> list[int]:
        """Those of this machine whose process has ended."""
        return [r for r, word in words.items() if word.process.ended(self.process.home)]

    def _gone(self, silent: list[int], words: dict[int, Word]) -> str:
        dead = self._dead({r: words[r] for r in silent})
        return self._list(silent, lambda r: f"has been silent for {max(0.0, time.time() - words[r].time):.0f} s"
                                            f"{', its process has ended' * (r in dead)}, "
                                            f"last heard of {_in(words[r].step)}{words[r].stands}")

    def _list(self, ranks: list[int], what: Callable[[int], str]) -> str:
        more = f"; and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return "; ".join(f"{self._rank(r)} {what(r)}" for r in ranks[:4]) + more

    def _behind(self, words: dict[int, Word]) -> list[int]:
        """The ranks that are least far. Those of one stage start the same collectives in the same order."""
        step = max(word.step for word in words.values())
        if late := [r for r, word in words.items() if word.step < step]:
            return late
        stages: dict[int, list[int]] = defaultdict(list)
        for r, word in words.items():
            stages[self.mesh.at(r).pp_rank].append(word.started)
        least, most = ({stage: f(started) for stage, started in stages.items()} for f in (min, max))
        return [r for r, word in words.items()
                if word.started == least[stage := self.mesh.at(r).pp_rank] and least[stage] < most[stage]]

    def _oldest(self) -> tuple[int, float] | None:
        """Number and start of the oldest collective that is known not to be complete."""
        return next(((n, since) for n, since, work in tuple(self.held) if not work.is_completed()), None)

    def _name(self, n: int) -> str:
        kind, where = self.names[n % NAMES]
        return f"the {kind} of {where}" if where else f"the {kind}"

    def _range(self, n: int) -> str:
        """Not every handle is held: one may wait for a collective between two that are."""
        first = 1 + max([self.complete, *(m for m, _, work in tuple(self.held) if m < n and work.is_completed())])
        before = f" or one of the {n - first} before it, from {self._name(first)} on"
        return self._name(n) + (before if first < n else "")

    def _last(self) -> str:
        return f" after {self._name(self.started)}" if self.started else ""

    def _stands(self) -> str:
        waits = self._oldest()
        at = f" at {self._name(waits[0])}" if waits else self._last()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and not frame.f_code.co_filename.startswith(HOUSE):
            frame = frame.f_back
        where = f", {frame.f_code.co_filename[len(HOUSE) + 1:]}:{frame.f_lineno}" if frame else ""
        return at + where

    def _say(self) -> None:
        self.beats, self.told = self.beats + 1, self.now
        word = Word(self.beats, time.time(), self.told, self.started, self._stands(), self.process)
        self.store.set(str(self.mesh.rank), json.dumps(word))

    def _read(self, ranks: Sequence[int] | None = None) -> dict[int, Word]:
        """What these ranks, or all, said last."""
        ranks = range(self.mesh.size) if ranks is None else ranks
        words = self.store.multi_get([*map(str, ranks)])
        said = zip(ranks, map(json.loads, words), strict=True)
        return {rank: Word._make([*word, Process(*process)]) for rank, (*word, process) in said}

    def _rank(self, rank: int) -> str:
        return f"rank {rank} ({self.mesh.at(rank).place})"


watch = Watch()
