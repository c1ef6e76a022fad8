"""What /proc tells of another rank's process: that it has ended, or nothing."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from stepladder.parallel.watch import Process, _born


def test_a_process_that_has_ended_is_known_before_its_parent_asks_and_after() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = Process.this()._replace(pid=child.pid, born=_born(child.pid) or 0)
    home = process.home
    assert home
    assert not process.ended(home)
    assert not process._replace(born=process.born + 1).ended("another")         # of another machine: not known
    assert process._replace(born=process.born - 1).ended(home)                  # its number is another's by now
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.ended(home)
    child.wait()
    assert process.ended(home)
    assert not process._replace(home="").ended("")


def test_what_proc_does_not_tell_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    me = Process.this()
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"7 (a) Z 1 (\xd0) S " + b"1 " * 18 + b"%d 0" % me.born)
    assert not me.ended(me.home)                      # a name that is no text, and looks like the rest of the line
    monkeypatch.setattr(os, "readlink", lambda _: "1")
    assert Process.this().home == ""                  # /proc is of another namespace than the process
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=OSError(24, "Too many open files")))
    assert not me.ended(me.home)
    assert Process.this().home == ""
