"""launch/log.py and launch/plot.py: every step once in metrics.jsonl, on TensorBoard, on the console and in the PNG."""
from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
from pathlib import Path

import matplotlib.image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import record_writer

from stepladder.launch import log, plot
from stepladder.launch.log import Log


def record(step: int, **more: object) -> dict:
    return {"step": step, "loss": 3.14159, "tokens": step * 4096, "lr": 3e-4, "grad_norm": 0.805,
            "tokens_per_s": 65_900.0, "mfu": 0.412, "memory_gib": 41.2, "data_wait": 0.001, "load": [1.2, 1.31],
            "entropy": [1.9, 2.0], "skipped": 0} | more


def logged(run: Path, steps: range, start: int = 0, **more: object) -> Log:
    out = Log(run, main=True, total_steps=100, step=start)
    for step in steps:
        out.step(record(step, **more))
    return out


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(run: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_every_step_stands_once_after_a_resume(tmp_path):
    logged(tmp_path, range(1, 8)).close()
    logged(tmp_path, range(6, 10), start=5, loss=1.0).close()
    found = lines(tmp_path)
    assert [r["step"] for r in found] == list(range(1, 10))
    assert [r["loss"] for r in found] == [3.14159] * 5 + [1.0] * 4
    assert [r["step"] for r in found if r.get("resumed")] == [6]
    assert scalars(tmp_path, "loss/train") == pytest.approx({r["step"]: r["loss"] for r in found})


def test_a_new_run_drops_the_records_of_an_old_one(tmp_path):
    logged(tmp_path, range(1, 4)).close()
    logged(tmp_path, range(1, 2)).close()
    assert [r["step"] for r in lines(tmp_path)] == [1]
    assert "resumed" not in lines(tmp_path)[0]


def test_tensorboard_forgets_what_came_after_the_resumed_step(tmp_path):
    logged(tmp_path, range(1, 8)).close()
    logged(tmp_path, range(4, 5), start=3).close()
    assert list(scalars(tmp_path, "loss/train")) == [1, 2, 3, 4]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 2.0}', "null\n"])
def test_a_torn_line_is_dropped_on_resume(tmp_path, torn):
    logged(tmp_path, range(1, 4)).close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    logged(tmp_path, range(4, 5), start=4).close()
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3, 4]


def test_records_are_on_disk_before_the_log_closes(tmp_path):
    out = logged(tmp_path, range(1, 3))
    assert len(lines(tmp_path)) == 2
    out.close()


def test_numbers_that_json_lacks_become_null(tmp_path, capsys):
    out = Log(tmp_path, main=True, total_steps=9)
    inf, half = torch.tensor(math.inf), torch.tensor(0.5)
    out.step(record(1, loss=math.nan, grad_norm=inf, load=[math.nan, 2.0], lr=half, mfu=None))
    out.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["loss"], found["grad_norm"], found["load"], found["lr"]) == (None, None, [None, 2.0], 0.5)
    assert "loss not finite  grad not finite" in capsys.readouterr().out


def test_the_console_line_can_be_read(tmp_path, capsys):
    logged(tmp_path, range(1, 2)).close()
    assert capsys.readouterr().out == ("  1/100   -:-- left  loss 3.1416  grad 0.81  65.9k tok/s  MFU 41.2%  "
                                       "wait 0.1%  load 1.31\n")


def test_the_time_left_follows_the_last_steps(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    logged(tmp_path, range(1, 5)).close()
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["-:--", "1:38:00", "1:37:00", "1:36:00"]


def test_every_thins_the_console_but_not_the_records(tmp_path, capsys):
    out = Log(tmp_path, main=True, total_steps=10, every=4)
    for step in range(1, 11):
        out.step(record(step, **({"eval_loss": 3.0} if step == 6 else {})))
    out.close()
    shown = [line.split("/")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1", "4", "6", "8", "10"]
    assert len(lines(tmp_path)) == 10


def test_a_terminal_gets_one_line_with_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    out = logged(tmp_path, range(50, 52))
    out.note("saved")
    out.close()
    text = capsys.readouterr().out
    assert text.startswith("\r[##########..........]  50/100   -:-- left  loss 3.1416")
    assert text.count("\n") == 2    # after the note and at the end
    assert "\r\x1b[Ksaved\n" in text


def test_a_heldout_line_stays_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log.sys.stdout, "isatty", lambda: True)
    logged(tmp_path, range(1, 3), eval_loss=3.0).close()
    text = capsys.readouterr().out
    assert text.count("\n") == 2
    assert text.endswith("\x1b[K\n")


def test_a_narrow_terminal_is_never_wrapped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    logged(tmp_path, range(1, 2)).close()
    shown = capsys.readouterr().out.strip("\r\n").removesuffix("\x1b[K")
    assert len(shown) == 39


def test_only_the_main_rank_writes(tmp_path, capsys):
    out = Log(tmp_path / "run", main=False, total_steps=9)
    out.step(record(1))
    out.note("hello")
    out.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_tensorboard_has_every_layer(tmp_path):
    logged(tmp_path, range(1, 3), eval_loss=2.5).close()
    assert scalars(tmp_path, "router/load/1") == pytest.approx({1: 1.31, 2: 1.31})
    assert scalars(tmp_path, "loss/heldout") == pytest.approx({1: 2.5, 2: 2.5})


def test_without_tensorboard_metrics_go_on_and_a_sentence_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "SummaryWriter", None)
    monkeypatch.setattr(log, "MISSING", "ImportError: no module", raising=False)
    logged(tmp_path, range(1, 3)).close()
    assert "package tensorboard does not load (ImportError: no module); pip install" in capsys.readouterr().out
    assert len(lines(tmp_path)) == 2


def test_a_full_disk_costs_records_and_not_the_run(tmp_path, capsys):
    out = logged(tmp_path, range(1, 2))
    kept, full = out.file, open("/dev/full", "w", buffering=1)    # noqa: SIM115
    out.file = full
    for step in (2, 3):
        out.step(record(step))
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be written" in line]
    assert said == [f"{tmp_path / 'metrics.jsonl'} cannot be written ([Errno {errno.ENOSPC}] No space left on device); "
                    "training goes on without its records"]
    out.file = kept
    out.step(record(4))
    out.close()
    assert [r["step"] for r in lines(tmp_path)] == [1, 4]


@pytest.mark.parametrize("says", ["no TensorBoard logs: ", "tensorboard cannot be written ("])
def test_a_full_disk_of_tensorboard_is_a_sentence_and_no_traceback_of_its_thread(tmp_path, capsys, monkeypatch, says):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    uncaught = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    early = says.startswith("no")
    if early:
        monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    out, step = logged(tmp_path, range(0)), 0
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    while not (out.full or (early and step)):              # its thread has yet to meet the error
        step += 1
        out.step(record(step))
    bug = threading.Thread(target=lambda: 1 // 0)
    bug.start()
    bug.join()
    out.close()
    assert [told.exc_type for told in uncaught] == [ZeroDivisionError]
    assert threading.excepthook == uncaught.append
    assert f"{says}[Errno {errno.ENOSPC}] full" in capsys.readouterr().out
    assert len(lines(tmp_path)) == step


def test_the_plot_shows_runs_and_marks_resumes(tmp_path, monkeypatch):
    for name in ("a", "b"):
        logged(tmp_path / name, range(1, 80), eval_loss=3.0).close()
        logged(tmp_path / name, range(61, 99), start=60, loss=math.nan).close()
    figures = []
    saved = plot.Figure.savefig
    monkeypatch.setattr(plot.Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k)))
    plot.plot([tmp_path / "a", tmp_path / "b"], tmp_path / "out" / "curves.png")
    labels = figures[0].axes[0].get_legend_handles_labels()[1]
    assert labels == [f"{run}{what}" for run in "ab" for what in ("", ", held out", ", resumed")]
    image = matplotlib.image.imread(tmp_path / "out" / "curves.png")
    assert image.shape[0] > 500
    assert image[..., :3].std() > 0.05    # something is drawn


def test_the_smoothed_loss_does_not_lag_and_skips_gaps():
    line = [float(i) for i in range(400)]
    assert plot._smoothed(line)[10:-10] == pytest.approx(line[10:-10])
    assert plot._smoothed([2.0] * 60) == pytest.approx(2.0)
    line[200] = math.nan
    assert plot._smoothed(line)[200] == pytest.approx(200)


def test_a_folder_without_metrics_cannot_be_plotted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metrics.jsonl; name the folder of a run"):
        plot.plot([tmp_path], tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no records yet"):
        plot.plot([tmp_path], tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5}\nnonsense\n{"step": 2, "tok')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        plot.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5}\n{"step": 2, "tok')
    assert len(plot.read(tmp_path)) == 1


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As of `train | tee` after a Ctrl-C, which ends tee as well."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        logged(tmp_path, range(1, 4)).close()
        log.say("saved")
        monkeypatch.undo()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
