"""What is known of a step only when the next has been queued: its report, and the time it took."""
from __future__ import annotations

import time

import torch

from stepladder.parallel.optimizer import Report


class Late:
    """A step's report on its way to the host."""

    def __init__(self, step: int, tokens: int, lr: float, report: Report, waited: float):
        self.step, self.tokens, self.lr, self.waited = step, tokens, lr, waited
        gpu = report.loss.is_cuda                        # pinned: a copy to other memory waits for the device
        self.report = Report(*(torch.empty_like(x, device="cpu", pin_memory=gpu).copy_(x, non_blocking=True)
                               for x in report))
        self.done = time.perf_counter()                  # on a CPU the step is over when it has been called
        self.arrived = torch.cuda.Event() if gpu else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> tuple[Report, float]:
        """The report, and when the step was over."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.arrived, self.done = None, time.perf_counter()
        return self.report, self.done


class Clock:
    """Splits wall time and the loader's waiting time into steps."""

    def start(self, waited: float) -> None:
        self.last, self.waited = time.perf_counter(), waited

    def lap(self, now: float, waited: float) -> tuple[float, float]:
        """Seconds since the step before, and of them waited for data."""
        took, wait = max(now - self.last, 1e-9), waited - self.waited
        self.last, self.waited = now, waited
        return took, wait
