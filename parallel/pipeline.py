"""A stage of the decoder as pipeline schedules want it, tensors in and tensors out, and the pass over micro-batches."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from stepladder.model.config import ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import Decoder
from stepladder.model.residual import Ready, Stats, Stream
from stepladder.parallel.mesh import Mesh


class Micro(NamedTuple):
    """What one pass through the model needs of a micro-batch; equal on every tp and pp rank."""
    tokens: Tensor                  # (B, T) int64
    targets: Tensor                 # (B, T) int64
    start: Tensor | None            # (B, T) bool; None: every row is one document
    borders: Tensor | None = None   # int32, see model/context.py

    def to(self, device: torch.device) -> Micro:
        return Micro(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # pyright: ignore


class Result(NamedTuple):
    """Sums over this rank's micro-batches."""
    loss: Tensor                    # () zero but on the last stage
    nll: Tensor                     # () the plain negative log-likelihood within it
    count: Tensor                   # () targets learned from; zero but on the last stage
    stats: tuple[Stats, ...]        # one for each MoE layer of this stage


def spans(layers: int, stages: int) -> list[range]:
    """Layers of each stage, as even as can be."""
    at = [round(layers * i / stages) for i in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(at)]


def routes(cfg: ModelConfig, layer: int) -> int:
    """How many router logits are on their way when `layer` begins."""
    waiting, seen = 0, 0
    moe = [b.channel for b in cfg.kinds() if b.channel.kind == "moe"]
    for block in cfg.kinds()[:layer]:
        if block.channel.kind == "moe":
            ahead = block.channel.ahead
            made = [*range(ahead + 1)] if seen == 0 else [seen + ahead]
            waiting += sum(n < len(moe) for n in made) - 1
            seen += 1
    return waiting


class Stage(nn.Module):
    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.first, self.last = decoder.span.start == 0, decoder.span.stop == decoder.cfg.layers
        self.passes: list[tuple[Tensor, tuple[Stats, ...]]] = []      # likelihood and statistics of each since take()

    def forward(self, *carried: Tensor, targets: Tensor, start: Tensor | None = None,
                borders: Tensor | None = None) -> tuple[Tensor, ...]:
        """tokens, or (h, late, *routes) of the stage before -> the same for the next stage, or (loss sum (1,),)."""
        if start is None:
            ctx = Context.plain(targets.shape[0], targets.shape[1], targets.device)
        else:
            ctx = Context.packed(start, None if borders is None else borders.flatten())
        x = carried[0] if self.first else Stream(carried[0], (Ready(carried[1]),), carried[2:])
        s = self.decoder(x, ctx)
        if not self.last:
            self.passes.append((s.h.new_zeros(()), s.stats))
            s = s.read(1)                             # at most one output stays late across a boundary
            return (s.h, s.late[0].wait(), *s.route)
        loss, nll = self.decoder.finish(s, targets)
        self.passes.append((nll.detach(), s.stats))
        return (loss.view(1),)

    def take(self) -> tuple[Tensor, tuple[Stats, ...]]:
        """Likelihoods and statistics summed over the passes since the last call."""
        nlls, stats = zip(*self.passes, strict=True)
        self.passes = []
        layers = zip(*stats, strict=True)
        return torch.stack(nlls).sum(), tuple(Stats(*(torch.stack(v).sum(0) for v in zip(*layer, strict=True)))
                                              for layer in layers)


class Pipe:
    """Runs micro-batches through this rank's stage: alone one after the other, with others by torch's 1F1B."""

    def __init__(self, stage: Stage, mesh: Mesh):
        self.stage, self.mesh = stage, mesh
        self.schedules: dict[tuple[object, ...], Schedule1F1B] = {}

    def __call__(self, micros: Sequence[Micro], train: bool = True) -> Result:
        """Forward, and backward if `train`. Gradients are left unreduced but for FSDP's own."""
        with torch.set_grad_enabled(train):
            loss = self._alone(micros, train) if self.mesh.pp == 1 else self._pipelined(micros, train)
        if not train:             # FSDP gives gathered weights back after a backward, and there was none
            for module in self.stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        nll, stats = self.stage.take()
        count = sum((m.targets >= 0).sum() for m in micros) if self.stage.last else torch.zeros_like(nll)
        return Result(loss, nll, torch.as_tensor(count), stats)

    def _alone(self, micros: Sequence[Micro], train: bool) -> Tensor:
        total = torch.zeros((), device=self.mesh.device)
        for m in micros:
            (loss,) = self.stage(m.tokens, targets=m.targets, start=m.start, borders=m.borders)
            if train:
                loss.sum().backward()
            total = total + loss.detach().sum()
        return total

    def _pipelined(self, micros: Sequence[Micro], train: bool) -> Tensor:
        schedule = self._schedule(micros, train)
        tokens, targets = torch.cat([m.tokens for m in micros]), torch.cat([m.targets for m in micros])
        rows: dict[str, Any] = {"targets": targets}
        if (starts := [m.start for m in micros if m.start is not None]):
            rows["start"] = torch.cat(starts)
        if (offsets := [m.borders for m in micros if m.borders is not None]):
            rows["borders"] = torch.stack(offsets)
        losses: list[Tensor] = []
        run = schedule.step if train else schedule.eval
        args = (tokens,) if self.stage.first else ()
        last: dict[str, Any] = {"target": targets, "losses": losses} if self.stage.last else {}
        run(*args, **last, return_outputs=False, **rows)
        return torch.stack([x.detach() for x in losses]).sum() if losses else torch.zeros((), device=self.mesh.device)

    def _schedule(self, micros: Sequence[Micro], train: bool) -> Schedule1F1B:
        key = (len(micros), micros[0].tokens.shape, train)
        if key not in self.schedules:
            span, mesh = self.stage.decoder.span, self.mesh
            stage = PipelineStage(self.stage, mesh.pp_rank, mesh.pp, mesh.device, group=mesh.group("pp"),
                                  input_args=self._boundary(micros[0], span.start),
                                  output_args=self._boundary(micros[0], span.stop))
            # The stage returns its loss; scaling waits for the global token count.
            self.schedules[key] = Schedule1F1B(stage, len(micros), loss_fn=lambda out, _: out[0].sum(),
                                               scale_grads=False)
        return self.schedules[key]

    def _boundary(self, m: Micro, layer: int) -> tuple[Tensor, ...]:
        """What crosses into `layer`, as meta tensors: shapes are declared, not found by a trial run."""
        cfg, dtype = self.stage.decoder.cfg, self.stage.decoder.dtype
        B, T = m.tokens.shape
        if layer == 0:
            return (m.tokens.to("meta"),)
        if layer == cfg.layers:
            return (torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device="meta", requires_grad=True),)
        part = self.mesh.tp if self.mesh.layout.sequence else 1
        h = torch.empty(B, T // part, cfg.width, dtype=dtype, device="meta", requires_grad=True)
        experts = next((b.channel.experts for b in cfg.kinds() if b.channel.kind == "moe"), 0)
        logits = torch.empty(B, T // self.mesh.tp, experts, dtype=torch.promote_types(dtype, torch.float32),
                             device="meta", requires_grad=True)
        return (h, h, *[logits] * routes(cfg, layer))
