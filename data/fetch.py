"""Files from elsewhere: a web server, a command or an object store; retried, and never waited for beyond a limit.

The only file that imports fsspec. Web addresses go through urllib and not through webdataset's opener: that starts a
curl of its own, which retries thirty times, has no limit for a server that falls silent, and follows environment
variables that rewrite addresses.
"""

from __future__ import annotations

import http.client
import math
import os
import queue
import random
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

try:
    import fsspec
except ImportError:              # folders, http(s) and commands need none
    fsspec = None

WEB = ("http://", "https://")
_CHUNK = 1 << 20
_LONGEST_PAUSE = 30.0  # seconds
_T = TypeVar("_T")


class Limits(NamedTuple):
    """How long a file from elsewhere is tried for, and where it is kept."""

    retries: int = 4  # attempts after the first
    stall: float = 30.0  # seconds without a byte that end an attempt
    total: float = 300.0  # seconds for one file, attempts and pauses together
    pause: float = 0.5  # seconds before the second attempt; they double
    seed: str = ""  # of the pauses' jitter: readers of different seeds do not come back at one moment
    cache: str = ""  # folder; none: shards are held in memory
    cache_gib: float = 100.0


DEFAULT = Limits()


class FetchError(OSError):
    """A file that did not come; the text says how often it was tried and what happened last."""


class Gone(FetchError):
    """An answer that another attempt would not change."""


class Stream(Protocol):
    def read(self) -> bytes:
        """What is there, at the end nothing. Raises when the file ends early."""
        ...

    def close(self) -> None: ...

    def abort(self) -> None:
        """Called from another thread: ends a read that waits, where something other than a socket's limit must."""
        ...


def elsewhere(base: str) -> bool:
    """Whether the address is not a folder's."""
    return base.startswith("pipe:") or "://" in base


class Remote:
    """Reads files by their whole address; all are of the kind of `base`. ValueError if nothing reads that kind."""

    def __init__(self, base: str, limits: Limits):
        self.limits = limits
        self.closed = False  # set from another thread: a fetch under way ends at once
        self._open: Callable[[str, float], Stream] = _kind(base)

    def fetch(
        self, url: str, take: Callable[[Iterator[bytes]], _T], until: float = math.inf, patient: bool = True
    ) -> _T:
        """What `take` makes of the file's bytes; after an OSError it is given them from the start again.

        until (time.monotonic) ends it before its own limit does. Not patient: so does the first attempt that stalls.
        """
        limits, began = self.limits, time.monotonic()
        until = min(until, began + limits.total)
        attempt = 0
        while True:
            attempt += 1
            try:
                with closing(self._chunks(url, until)) as chunks:
                    return take(chunks)
            except OSError as error:
                last = error
            gone = isinstance(last, Gone)
            final = gone or (not patient and isinstance(last, TimeoutError)) or attempt > limits.retries
            pause = self._pause(url, attempt)
            if final or time.monotonic() + pause >= until:
                tried = f"{attempt} attempt{'s' * (attempt > 1)} in {time.monotonic() - began:.1f} s"
                raise (Gone if gone else FetchError)(f"{tried}, {'the last: ' * (attempt > 1)}{_told(last)}") from None
            self._sleep(pause)

    def _pause(self, url: str, attempt: int) -> float:
        """Exponential, between half and one and a half of its mean, from a generator of its own."""
        jitter = random.Random(f"pause {self.limits.seed} {url} {attempt}").random()
        return min(self.limits.pause * 2 ** (attempt - 1), _LONGEST_PAUSE) * (0.5 + jitter)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.closed and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _chunks(self, url: str, until: float) -> Generator[bytes]:
        """The bytes as they come. A thread reads them: names, commands and object stores know no time limit."""
        ahead: queue.Queue[bytes | Exception] = queue.Queue(8)
        halt, opened = threading.Event(), []
        reader = lambda: self._open(url, self.limits.stall)
        threading.Thread(target=_pump, args=(reader, opened, ahead, halt), daemon=True, name="fetch").start()
        try:
            while made := self._next(ahead, until):
                if isinstance(made, Exception):
                    _raise(made)
                yield made
        finally:
            halt.set()
            for stream in opened:
                stream.abort()

    def _next(self, ahead: queue.Queue, until: float) -> bytes | Exception:
        silent = time.monotonic() + self.limits.stall
        while not self.closed:
            try:
                return ahead.get(timeout=max(0.0, min(silent - time.monotonic(), until - time.monotonic(), 0.2)))
            except queue.Empty:
                now = time.monotonic()
            if now >= until:
                raise TimeoutError("not done in time")
            if now >= silent:
                raise TimeoutError(f"no byte came for {self.limits.stall:g} s")
        raise Gone("the reader was closed")


def _pump(reader: Callable[[], Stream], opened: list[Stream], ahead: queue.Queue, halt: threading.Event) -> None:
    """Puts the file's bytes into the queue, then nothing or what went wrong."""

    def put(made: bytes | Exception) -> None:
        while not halt.is_set():
            try:
                return ahead.put(made, timeout=0.1)
            except queue.Full:
                continue

    try:
        with closing(reader()) as stream:
            opened.append(stream)
            while not halt.is_set():
                put(data := stream.read())
                if not data:
                    return
    except Exception as error:  # object stores raise what they like
        put(error)


def _raise(error: Exception) -> NoReturn:
    """The error of a stream as one that is worth another attempt, or as Gone."""
    asked = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 425, 429)
    if asked or isinstance(error, Gone | FileNotFoundError | PermissionError | ValueError | ImportError):
        raise Gone(_told(error)) from None
    raise OSError(_told(error)) from None


def _told(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, Exception) else OSError(error.reason)
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _kind(base: str) -> Callable[[str, float], Stream]:
    if base.startswith("pipe:"):
        return _Pipe
    if base.startswith(WEB):
        return _Web
    if fsspec is None:
        raise ValueError(
            f"{base}: object stores need package fsspec, which is not installed: pip install 'stepladder[fsspec]'; "
            "folders, http(s) addresses and pipe: commands work without it"
        )
    for part in base.split("::"):
        try:
            fsspec.get_filesystem_class(part.partition("://")[0])
        except (ImportError, ValueError) as error:
            raise ValueError(f"{base}: fsspec cannot read it ({error}); install what it names") from None
    return _Store


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows a server to other servers, never out of the web or from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        known = WEB[1:] if req.full_url.startswith("https://") else WEB
        if not newurl.startswith(known):
            raise Gone(f"the server redirects to {newurl}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Without the handlers for file:, ftp: and data: that urllib adds by itself."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirect,
                    urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
                    urllib.request.UnknownHandler):  # fmt: skip
        opener.add_handler(handler())
    return opener


class _Web:
    def __init__(self, url: str, stall: float):
        # A little later than the reader's own limit, which has the better words: it is for the thread to end.
        self._answer: http.client.HTTPResponse = _opener().open(url, timeout=stall + 1)

    def read(self) -> bytes:
        data = self._answer.read1(_CHUNK)
        if not data and self._answer.length:
            raise OSError(f"the connection ended {self._answer.length} bytes early")
        return data

    def close(self) -> None:
        self._answer.close()

    def abort(self) -> None:
        """The socket has a limit."""


class _Pipe:
    """A shell command's output. It comes from the user's configuration only, never out of a manifest."""

    def __init__(self, url: str, stall: float):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            url.removeprefix("pipe:"), shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=self._errors, start_new_session=True,
        )  # fmt: skip

    def read(self) -> bytes:
        data = self._process.stdout.read1(_CHUNK)  # type: ignore[union-attr]
        if not data and (code := self._process.wait()):
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines() or [""]
            kind = Gone if code in (126, 127) else OSError  # there is no such command
            raise kind(f"the command ended with code {code}: {lines[-1]}".removesuffix(": "))
        return data

    def close(self) -> None:
        self.abort()
        self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def abort(self) -> None:
        """Kills the shell and what it started."""
        with suppress(ProcessLookupError):  # it ended between the two calls
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)


class _Store:
    def __init__(self, url: str, stall: float):
        self._file: Any = fsspec.open(url, "rb").open()  # type: ignore[union-attr]

    def read(self) -> bytes:
        return self._file.read(_CHUNK)

    def close(self) -> None:
        self._file.close()

    def abort(self) -> None:
        """Left to the store's own limits; the thread waits for it, nobody else does."""
