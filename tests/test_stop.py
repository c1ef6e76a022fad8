"""A signal stops all ranks after the same step, the furthest that one of them has begun, whoever got it."""
from __future__ import annotations

import atexit
import inspect
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import PContext

from stepladder.launch import stop
from stepladder.launch.stop import Stop
from stepladder.parallel.watch import EXIT, LostRank


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in stop.SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Stop]]:
    """Three ranks of a run that is to begin step 1, or those of them that are alive. Real signals reach the first."""
    monkeypatch.setattr(stop, "_round", itertools.repeat(0))
    store, made = dist.HashStore(), []
    for rank in reversed(getattr(request, "param", (0, 1, 2))):
        made.insert(0, Stop())
        made[0].meet(store, rank, 3, 1)
    yield made
    for s in made:
        s.close()


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)


def ask(rank: Stop, number: int) -> None:
    os.write(rank.pipe, bytes([number]))


def test_ranks_that_are_ahead_set_the_last_step_and_the_others_catch_up(ranks: list[Stop]):
    for rank, begun in zip(ranks, (6, 7, 5), strict=True):
        for step in range(1, begun + 1):
            assert rank.may_begin(step)
    ask(ranks[2], signal.SIGUSR1)
    for rank in ranks:
        assert rank.known.wait(30)
        assert [rank.may_begin(step) for step in (6, 7, 8)] == [True, True, False]
    assert [rank.asked for rank in ranks] == ["SIGUSR1 to rank 2", "SIGUSR1 to rank 2", "SIGUSR1"]


def test_no_step_is_begun_before_the_last_one_is_known():
    one = Stop()
    one.asked = "SIGTERM"
    with ThreadPoolExecutor(1) as pool:
        may = pool.submit(one.may_begin, 2)
        time.sleep(0.1)
        assert not may.done()
        one.last = 2
        one.known.set()
    assert may.result()
    one.close()


def test_a_signal_before_the_first_step_lets_that_one_be_made(ranks: list[Stop]):
    ask(ranks[0], signal.SIGTERM)
    assert all(rank.known.wait(30) for rank in ranks)
    assert [[rank.may_begin(step) for step in (1, 2)] for rank in ranks] == [[True, False]] * 3


def test_a_signal_that_comes_before_the_ranks_have_met_is_kept():
    early = Stop()
    ask(early, signal.SIGTERM)
    time.sleep(0.1)
    early.meet(None, 0, 1, 3)
    assert early.known.wait(30)
    assert early.may_begin(3)
    assert not early.may_begin(4)
    early.close()


@pytest.mark.parametrize("ranks", [(0, 2)], indirect=True)
def test_a_rank_that_does_not_answer_is_named_on_all_others(ranks: list[Stop], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stop, "SOON", timedelta(seconds=0.1))
    monkeypatch.setattr(stop, "PATIENCE", timedelta(seconds=0.3))
    ask(ranks[0], signal.SIGTERM)
    for rank in ranks:
        assert rank.known.wait(30)
        with pytest.raises(LostRank, match="SIGTERM asks the run to stop, but rank 1 did not answer"):
            rank.may_begin(2)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which this process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(stop, "LOOK", 0.05)
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("met", [True, False])
def test_a_ctrl_c_says_what_comes_of_it_and_of_a_second_which_ends_the_program(ended, capfd, met: bool):
    told: list[str] = []
    notes: list[str] = []
    one = Stop(told.append, notes.append, alone=True)
    if met:
        one.meet(None, 0, 1, 1)
    for heard in (notes, ended):
        assert not heard
        os.kill(os.getpid(), signal.SIGINT)
        until(heard.__len__)
    assert (one.asked, ended) == ("SIGINT", [130])
    step = "this" if met else "the first"
    one.close()
    assert notes == [f"SIGINT: stops after {step} step, with a checkpoint; again: at once, without"]
    assert told == ["the second SIGINT ends the run at once"]
    assert capfd.readouterr().err == f"stepladder: {told[0]}\n"


@pytest.mark.parametrize("to", [0, 2])
def test_a_stop_goes_on_where_nobody_reads_what_is_said_of_it(ranks: list[Stop], to: int):
    """As of `train | tee`: the same Ctrl-C ends tee."""
    def broken(text: str) -> None:
        raise BrokenPipeError

    ranks[0].note = broken
    ask(ranks[to], signal.SIGINT)
    assert all(rank.known.wait(5) for rank in ranks)


def test_what_comes_of_a_signal_is_said_once_by_rank_0(ranks: list[Stop]):
    """Which alone is given something to say it with."""
    notes: list[str] = []
    ranks[0].note = notes.append
    for rank, number in ((2, signal.SIGINT), (0, signal.SIGINT), (1, signal.SIGTERM)):
        ask(ranks[rank], number)
        assert ranks[0].known.wait(30)
    for rank in ranks:
        rank.close()
    assert notes == ["SIGINT to rank 2: stops after this step, with a checkpoint"]


def test_a_rank_that_is_to_stop_does_not_wait_for_those_that_never_come(ended, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stop, "COMING", 0.1)
    told: list[str] = []
    early = Stop(told.append)
    ask(early, signal.SIGTERM)
    until(lambda: ended)
    early.close()
    assert ended == [EXIT]
    assert told == ["SIGTERM asks the run to stop, and not all of its ranks have come"]
    assert capfd.readouterr().err == f"stepladder: {told[0]}\n"


@pytest.mark.parametrize("gets_on", [False, True])
def test_a_rank_that_cannot_stop_with_the_others_ends_whatever_it_waits_for(ended, capfd, gets_on: bool,
                                                                          monkeypatch: pytest.MonkeyPatch):
    for name, seconds in (("SOON", 0.05), ("PATIENCE", 0.1)):
        monkeypatch.setattr(stop, name, timedelta(seconds=seconds))
    monkeypatch.setattr(stop, "TELL", 60 if gets_on else 0.1)
    told: list[str] = []
    one = Stop(told.append)
    one.meet(None, 0, 2, 1)
    ask(one, signal.SIGTERM)
    until(lambda: one.lost if gets_on else ended)
    one.close()
    assert ended == [EXIT] * (not gets_on)
    assert told == ["SIGTERM asks the run to stop, but rank 1 did not answer"] * (not gets_on)
    assert capfd.readouterr().err == "".join(f"stepladder: {why}\n" for why in told)


def test_a_rank_that_knows_it_cannot_stop_with_the_others_has_time_for_a_save_under_way(ended, monkeypatch):
    for name, seconds in (("SOON", 0.05), ("PATIENCE", 0.1)):
        monkeypatch.setattr(stop, name, timedelta(seconds=seconds))
    one = Stop()
    one.meet(None, 0, 2, 1)
    asks = one.threads[0]
    ask(one, signal.SIGTERM)
    with pytest.raises(LostRank):
        until(lambda: one.asked and one.may_begin(2))
    until(lambda: not any(thread.is_alive() for thread in one.threads if thread is not asks))
    one.close()
    assert not ended


def test_who_is_missing_is_said_before_torchrun_kills():
    assert inspect.signature(PContext.close).parameters["timeout"].default > stop.COMING


@pytest.mark.parametrize(("stays", "saves", "codes"), [(True, False, []), (False, False, [EXIT]), (False, True, [])])
def test_a_rank_ends_with_its_launcher_unless_it_is_about_to(ended, capfd, monkeypatch: pytest.MonkeyPatch, stays: bool,
                                                             saves: bool, codes: list[int]):
    told: list[str] = []
    parent, one = os.getppid(), Stop(told.append)
    one.meet(None, 0, 1, 1)
    one.asked = "SIGTERM" if saves else ""
    one.follow(parent, "torchrun is gone")
    if not stays:
        monkeypatch.setattr(os, "getppid", lambda: 1)
    if codes:
        until(lambda: ended)
    else:
        time.sleep(0.3)
    one.close()
    assert ended == codes
    assert told == ["torchrun is gone"] * len(codes)
    assert capfd.readouterr().err == "stepladder: torchrun is gone\n" * len(codes)


def test_a_rank_that_has_come_to_its_end_answers_for_the_last_step(ranks: list[Stop]):
    for rank in ranks:
        assert rank.may_begin(4)
    for rank in ranks[:2]:
        rank.close()
    ask(ranks[2], signal.SIGTERM)
    assert ranks[2].known.wait(30)
    assert not ranks[2].may_begin(5)


def test_a_signal_while_python_takes_its_handlers_away_does_nothing(monkeypatch: pytest.MonkeyPatch):
    """It does so before the process ends, and a finished run then died of Slurm's USR1."""
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    Stop().close()
    for last in at_exit:
        last()
    assert {signal.getsignal(number) for number in stop.SIGNALS} == {signal.SIG_IGN}


def test_a_stop_that_is_closed_leaves_no_thread():
    before = threading.active_count()
    one = Stop()
    one.meet(None, 0, 1, 1)
    one.close()
    assert threading.active_count() == before
