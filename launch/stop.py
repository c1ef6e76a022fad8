"""Stopping: TERM, USR1 and Ctrl-C ask for a checkpoint and an end, and all ranks end after the same step.

A signal may come several times, to one rank or to all: launchers pass on what Slurm sends to everyone anyway. It is
seen at once, also while the program waits for its device or another rank, when Python runs no handler: the interpreter
writes its number to a pipe, which a thread reads. Threads of all ranks then say through the store which step their rank
has begun, and the furthest of these is the last. Nobody begins another before it is known, so none waits for a step
that another leaves out. Training itself is never asked: no host sync, nothing between its collectives.

A launcher also sends TERM to the others when a rank has died. Over gloo a connection has broken by then, but NCCL waits
on, in silence. So who does not answer soon is suspected, and if it is gone the watch names it and ends the others.

A second Ctrl-C ends its process at once, and saves nothing.

Signals that launch/cli.py kept back while it imported torch are seen as well. And there is an end that nobody asks for:
a launcher that is killed leaves its ranks behind, and they follow it.
"""
from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from stepladder.parallel.watch import EXIT, TELL, LostRank, listed, watch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE = timedelta(seconds=20)    # with threads that only have to answer; torchrun and Slurm kill after 30
SOON = timedelta(seconds=1)         # until those that did not are suspected
EVER = timedelta(days=20)           # in milliseconds it must fit into 31 bits
COMING = 25.0                       # seconds for ranks that are to stop to come together: imports take unlike times
INTERRUPTED = 130                   # the exit code of a second Ctrl-C
LOOK = 1.0                          # seconds between two looks whether the launcher is there
_round = itertools.count()          # a store outlives a run in tests


class Stop:
    """The end that a signal asks for. Signals that come before `meet` are kept until then, if only all ranks come."""

    def __init__(self, tell: Callable[[str], None] = lambda why: None,
                 note: Callable[[str], None] = lambda text: None, alone: bool = False) -> None:
        """`tell` hears why this process ends, where that is not in an exception; `note` what comes of a signal."""
        self.tell, self.note, self.noted, self.alone = tell, note, threading.Lock(), alone
        self.asked = ""                                    # the signal's name, and whose it was if another rank's
        self.rank = self.begun = self.last = 0             # last: step of the run, once it is known
        self.lost = ""                                     # why it will never be
        self.store: dist.Store | None = None
        # came: all ranks; known: the last step, or why not; heard: training knows it, too
        self.came, self.met, self.known, self.heard, self.over = (threading.Event() for _ in range(5))
        pipe, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        with contextlib.suppress(ValueError):              # not in the main thread: a test
            signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
            for number in SIGNALS:
                signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.threads: list[threading.Thread] = []          # before the first runs: it adds to them
        self.threads.append(self._thread(self._hear, pipe))

    def meet(self, store: dist.Store | None, rank: int, size: int, step: int) -> None:
        """Agree with the other ranks from now on; `step` is the next one, and is made in any case."""
        self.rank, self.size, self.begun = rank, size, step
        prefix, common = f"stop/{next(_round)}", store or dist.HashStore()
        # Any thread may wait in its store for long, so each has a connection of its own.
        self.store, theirs = (dist.PrefixStore(prefix, common.clone()) for _ in range(2))  # pyright: ignore
        self.came.set()
        self.met.set()
        self.threads.append(self._thread(self._answer, theirs))

    def follow(self, parent: int, what: str) -> None:
        """End this process soon after its launcher, process `parent`; `what` says who is gone."""
        self.threads.append(self._thread(self._follow, parent, what))

    def may_begin(self, step: int) -> bool:
        """Whether the run goes on with `step`. When somebody has asked it to stop, wait until all have answered."""
        if not self.asked:
            self.begun = max(self.begun, step)
            if not self.asked:                             # else the answer counts this step, or does not: wait for it
                return True
        self.known.wait()
        self.heard.set()
        if self.lost:
            raise LostRank(f"{self.asked} asks the run to stop, but {self.lost}")
        return step <= self.last

    def close(self) -> None:
        """No further step will be begun; signals that still come do nothing."""
        if self.over.is_set():
            return
        self.over.set()
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        atexit.register(_deafen)
        os.close(self.pipe)
        self._ask(self.rank, "")
        for event in (self.came, self.met, self.known, self.heard):
            event.set()
        for thread in self.threads:
            thread.join(1)

    def _handle(self, number: int, _: object) -> None:
        self.asked = self.asked or signal.Signals(number).name

    def _hear(self, pipe: int) -> None:
        heard: set[str] = set()
        with open(pipe, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in SIGNALS:
                    name = signal.Signals(number[0]).name
                    if name == "SIGINT" and name in heard:           # here, as Python may wait for the device
                        _leave("the second SIGINT ends the run at once", self.tell, INTERRUPTED)
                    if not heard:
                        self.asked = self.asked or name
                        self.threads.append(self._thread(self._pass_on, name))
                        self._say(name)
                    heard.add(name)

    def _pass_on(self, name: str) -> None:
        """Tell all ranks of the signal that came to this one."""
        if not self.came.wait(COMING):
            _leave(f"{name} asks the run to stop, and not all of its ranks have come", self.tell)
        self.met.wait()
        self._ask(0, f"{name} to rank {self.rank}" if self.rank else name)    # who asks the others
        self._ask(self.rank, name)                      # rank 0 may have come to its end
        self.known.wait()
        if self.lost and not self.heard.wait(TELL):     # training waits for a device or a rank that will not come
            _leave(f"{self.asked} asks the run to stop, but {self.lost}", self.tell)

    def _say(self, word: str) -> None:
        """Once, however many signals come."""
        if self.noted.acquire(blocking=False):
            with contextlib.suppress(OSError):     # the same Ctrl-C may have ended the reader; the stop goes on
                self.note(f"{word}: stops after {'this' if self.met.is_set() else 'the first'} step, with a checkpoint"
                          f"{'; again: at once, without' * (self.alone and word == 'SIGINT')}")

    def _follow(self, parent: int, what: str) -> None:
        while os.getppid() == parent:
            if self.over.wait(LOOK):
                return
        if not (self.asked and self.over.wait(PATIENCE.total_seconds())):      # a signal to both: it may be saving
            _leave(what, self.tell)

    def _ask(self, rank: int, word: str) -> None:
        if self.store is not None:
            with contextlib.suppress(RuntimeError):        # its thread will find out too
                self.store.set(f"asked/{rank}", word)

    def _answer(self, store: dist.Store) -> None:
        """Wait until this rank is asked to stop, with the signal's name, or has come to its end, with nothing."""
        try:
            store.wait([f"asked/{self.rank}"], EVER)
            word = store.get(f"asked/{self.rank}").decode()
            self.asked = self.asked or word
            store.set(f"begun/{self.rank}", str(self.begun))
            if self.rank == 0:
                store.set("last", self._gather(store, word) if word else str(self.begun))
            if word:
                self._say(word)
                if self._missing(store, ["last"], 2 * SOON):         # rank 0 suspects the others, these suspect rank 0
                    self._thread(watch.suspect, [0])
                    store.wait(["last"], 2 * PATIENCE)
                last = store.get("last").decode()
                self.last, self.lost = (int(last), "") if last.isdecimal() else (0, last)
        except RuntimeError as error:
            self.lost = f"the store, at rank 0 or its launcher, is gone: {error}"
        self.known.set()

    def _gather(self, store: dist.Store, word: str) -> str:
        """Rank 0: the furthest step that a rank has begun, or who did not say."""
        for rank in range(1, self.size):
            self._ask(rank, word)
        begun = [f"begun/{rank}" for rank in range(self.size)]
        if late := self._missing(store, begun, SOON):
            self._thread(watch.suspect, late)
            if late := self._missing(store, begun, PATIENCE - SOON):
                return f"{listed(late)} did not answer"
        return str(max(map(int, store.multi_get(begun))))

    @staticmethod
    def _missing(store: dist.Store, keys: list[str], patience: timedelta) -> list[int]:
        """Which keys have not come when all have, or patience ends."""
        try:
            store.wait(keys, patience)
        except RuntimeError:
            return [n for n, key in enumerate(keys) if not store.check([key])]
        return []

    @staticmethod
    def _thread(work: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=args, name="stop", daemon=True)
        thread.start()
        return thread


def _deafen() -> None:
    """Python's handlers go before its process does, and the default of a late signal would end a finished run badly."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(why: str, tell: Callable[[str], None], code: int = EXIT) -> None:
    """End this process, whatever it waits for."""
    with contextlib.suppress(OSError):
        os.write(2, f"stepladder: {why}\n".encode())
    telling = threading.Thread(target=tell, args=(why,), daemon=True)
    telling.start()
    telling.join(TELL)                                     # the disk may be what hangs
    os._exit(code)
