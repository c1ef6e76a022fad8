"""Stages of the decoder as pipeline schedules want them, tensors in and out, and the pass over micro-batches."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.nn import functional as F

from stepladder.model.config import ModelConfig
from stepladder.model.context import Context
from stepladder.model.decoder import Decoder
from stepladder.model.residual import Ready, Stats, Stream
from stepladder.ops.linear import Put, catch_up, put_off
from stepladder.ops.loss import IGNORE
from stepladder.parallel.graph import Captured
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.watch import watch

Schedule = Schedule1F1B | ScheduleInterleaved1F1B | ScheduleZBVZeroBubble
META = torch.device("meta")
SCHEDULES = {"interleaved": ScheduleInterleaved1F1B, "zero-bubble": ScheduleZBVZeroBubble}


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
    loss: Tensor                    # () zero but on the rank of the last stage
    nll: Tensor                     # () the plain negative log-likelihood within it
    count: Tensor                   # () targets learned from; zero but on the last stage's rank
    stats: tuple[Stats, ...]        # one for each MoE layer of this rank, in order


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


class Clock(Protocol):
    """Told in training when a stage begins and ends a forward (F), a backward (B), or its halves for inputs (I) and
    weights (W)."""

    def begin(self) -> None: ...

    def end(self, kind: str, stage: int, micro: int) -> None: ...


class _Timed(PipelineStage):
    """torch's stage. It tells the pipe's clock, if it has one, of each of its pieces of work, and has memory for what
    comes of micro-batches under way alone: torch's has it for all of a step's, for good.

    What goes out is torch's: NCCL lets go of a tensor that has been sent, but gloo's handle holds it, and schedules of
    several spans a rank hold the handles until the step ends.
    """
    pipe: Pipe

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._on(META):
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._on(META):
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        ours, self.device = self.device, device
        try:
            yield
        finally:
            self.device = ours

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        out = self._tell("F", fwd_chunk_id, super().forward_one_chunk, *args, **kwargs)
        if not torch.is_grad_enabled():                    # no backward will ask for what came in, or stays here
            mesh, (sent, _) = self.pipe.mesh, self.fwd_cache[fwd_chunk_id]
            self.fwd_cache[fwd_chunk_id] = () if self.stage_index + 1 in mesh.layout.held(mesh.pp_rank) else sent, []
            _move(self.args_recv_info[fwd_chunk_id], META)
        return out

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True,
                           last_backward: bool = False) -> None:
        self._tell("B" if full_backward else "I", bwd_chunk_id, super().backward_one_chunk, loss, full_backward,
                   last_backward)
        if loss is not None:                # torch keeps it until the step ends: its graph would hold what came in
            loss.detach_()
        for received in (self.args_recv_info, self.grad_recv_info):
            _move(received.get(bwd_chunk_id, ()), META)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        self._tell("W", bwd_chunk_id, super().backward_weight_one_chunk, last_backward)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 has the two stages at the tip of a V, on one rank, greet each other; gloo cannot. Drop with it."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        _move(self.args_recv_info[fwd_chunk_id], self.device)
        return self._noted("transfer of activations to", fwd_chunk_id, super().get_fwd_recv_ops)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        found = self._noted("transfer of activations from", fwd_chunk_id, super().get_fwd_send_ops)
        if not torch.is_grad_enabled():
            del self.fwd_cache[fwd_chunk_id]               # nor what went out
        return found

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        _move(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return self._noted("transfer of gradients to", bwd_chunk_id, super().get_bwd_recv_ops)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._noted("transfer of gradients from", bwd_chunk_id, super().get_bwd_send_ops)

    def _noted(self, what: str, micro: int, ops: Callable[[int], list[dist.P2POp]]) -> list[dist.P2POp]:
        """What is transferred next, the watchdog told, each way by a group of its own where the mesh has them."""
        if found := ops(micro):
            watch.note(f"{what} stage {self.stage_index} of micro-batch {micro}")
        return [self._apart(op) for op in found]

    def _apart(self, op: dist.P2POp) -> dist.P2POp:
        """Without the graph, which from a handle leads to what came in; torch 2.13 leaves it out itself."""
        mesh = self.pipe.mesh
        way = (mesh.pp_rank, op.group_peer) if op.op is dist.isend else (op.group_peer, mesh.pp_rank)
        return dist.P2POp(op.op, op.tensor.detach(), op.peer, mesh.edges.get(way, op.group))

    def _tell(self, kind: str, micro: int, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        clock = self.pipe.clock
        if clock is None or not torch.is_grad_enabled():
            return work(micro, *args, **kwargs)
        clock.begin()
        out = work(micro, *args, **kwargs)
        clock.end(kind, self.stage_index, micro)
        return out


def _move(received: Sequence[Any], device: torch.device) -> None:
    """Memory for what a stage receives of a micro-batch: new on `device`, none on META."""
    for info in received:
        if (old := getattr(info, "buffer", None)) is not None:        # a first stage receives nothing
            info.buffer = torch.empty_like(old, device=device).requires_grad_(old.requires_grad)


class Pipe:
    """Runs micro-batches through this rank's stages: alone one after the other, with others by torch's schedules."""

    def __init__(self, stages: Sequence[Stage], mesh: Mesh):
        self.stages, self.mesh = list(stages), mesh
        self.schedules: dict[tuple[object, ...], Schedule] = {}
        self.clock: Clock | None = None
        self.later: list[Put] = []                 # weight gradients that the backward under way has put off
        self.captured: Captured | None = None
        # Of a pass over one stage; DeepSpeed's engine puts its own here.
        self.forward: Callable[..., tuple[Tensor, ...]] = self.stages[0]
        self.backward: Callable[[Tensor], Any] = Tensor.backward
        self.at_close: Callable[[], None] = lambda: None

    def __call__(self, micros: Sequence[Micro], train: bool = True) -> Result:
        """Forward, and backward if `train`. Gradients are left unreduced but for FSDP's own."""
        with torch.set_grad_enabled(train):
            loss = self._alone(micros, train) if self.mesh.pp == 1 else self._pipelined(micros, train)
        if not train:             # FSDP gives gathered weights back after a backward, and there was none
            for stage in self.stages:
                for module in stage.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()
        nll, stats = zip(*(stage.take() for stage in self.stages), strict=True)
        last = self.stages[-1].last
        count = sum((m.targets != IGNORE).sum() for m in micros) if last else torch.zeros_like(nll[-1])
        return Result(loss, nll[-1], torch.as_tensor(count), tuple(chain.from_iterable(stats)))

    def _alone(self, micros: Sequence[Micro], train: bool) -> Tensor:
        total = torch.zeros((), device=self.mesh.device)
        for i, m in enumerate(micros):
            if train and self.captured is not None:
                loss, nll, *stats = self.captured(m, first=i == 0)
                self.stages[0].passes.append((nll, tuple(Stats(*stats[n:n + 3]) for n in range(0, len(stats), 3))))
            else:
                loss = self._one(m, train)
            total = total + loss
        return total

    def _one(self, m: Micro, train: bool) -> Tensor:
        (loss,) = self.forward(m.tokens, targets=m.targets, start=m.start, borders=m.borders)
        if train:
            self.backward(loss.sum())
        return loss.detach().sum()

    def close(self) -> None:
        """Forget what was recorded: a communicator that a graph holds is never taken down."""
        self.captured = None
        self.at_close()

    def capture(self) -> None:
        """Record the training passes of micro-batches as CUDA graphs from now on."""
        def run(inputs: Micro) -> tuple[Tensor, ...]:
            loss = self._one(inputs, train=True)
            nll, stats = self.stages[0].passes.pop()
            return loss, nll, *chain.from_iterable(stats)
        params = [p for p in self.stages[0].parameters() if p.requires_grad]
        self.captured = Captured(run, params, self.mesh.device)

    def _pipelined(self, micros: Sequence[Micro], train: bool) -> Tensor:
        schedule = self._schedule(micros, train)
        tokens, targets = torch.cat([m.tokens for m in micros]), torch.cat([m.targets for m in micros])
        rows: dict[str, Any] = {"targets": targets}
        if (starts := [m.start for m in micros if m.start is not None]):
            rows["start"] = torch.cat(starts)
        if (offsets := [m.borders for m in micros if m.borders is not None]):
            longest = max(map(len, offsets))           # a micro-batch of many documents has a longer list of them
            rows["borders"] = torch.stack([F.pad(o, (0, longest - len(o)), value=micros[0].tokens.numel())
                                           for o in offsets])
        losses: list[Tensor] = []
        run = schedule.step if train else schedule.eval
        args = (tokens,) if self.stages[0].first else ()
        last: dict[str, Any] = {"target": targets, "losses": losses} if self.stages[-1].last else {}
        split = train and self.mesh.layout.schedule == "zero-bubble"
        with put_off(self.later) if split else nullcontext():
            run(*args, **last, return_outputs=False, **rows)
        return torch.stack([x.detach() for x in losses]).sum() if losses else torch.zeros((), device=self.mesh.device)

    def _schedule(self, micros: Sequence[Micro], train: bool) -> Schedule:
        key = (len(micros), micros[0].tokens.shape, train)
        if key not in self.schedules:
            layout, n = self.mesh.layout, len(micros)
            stages = [self._stage(*held, micros[0]) for held in zip(layout.held(self.mesh.pp_rank), self.stages,
                                                                  strict=True)]
            # The stage returns its loss; scaling waits for the global token count.
            how: dict[str, Any] = {"loss_fn": lambda out, _: out[0].sum(), "scale_grads": False}
            if layout.schedule == "1f1b":
                schedule = Schedule1F1B(stages[0], n, **how)
            else:
                schedule = SCHEDULES[layout.schedule](stages, n, **how)
                if not train:
                    _forward_only(schedule)
            self.schedules[key] = schedule
        return self.schedules[key]

    def _stage(self, index: int, stage: Stage, m: Micro) -> PipelineStage:
        span, mesh = stage.decoder.span, self.mesh
        split = self._weights if mesh.layout.schedule == "zero-bubble" else None
        out = _Timed(stage, index, mesh.layout.stages, mesh.device, group=mesh.group("pp"), dw_builder=split,
                     input_args=_boundary(stage.decoder, mesh, m, span.start),
                     output_args=_boundary(stage.decoder, mesh, m, span.stop))
        out.pipe = self
        return out

    def _weights(self) -> Callable[[], None]:
        """What the backward that has just run left to do: torch asks for it then, and calls it when there is time."""
        later = self.later.copy()
        self.later.clear()
        return lambda: catch_up(later)


def _forward_only(schedule: ScheduleInterleaved1F1B | ScheduleZBVZeroBubble) -> None:
    """Leave a schedule its forwards and what they need: torch's eval walks the backwards too, and trips in a V."""
    kept = {"FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD"}
    schedule.pipeline_order_with_comms = {
        rank: [a for a in actions if a.computation_type.name in kept]
        for rank, actions in schedule.pipeline_order_with_comms.items()}


def _boundary(decoder: Decoder, mesh: Mesh, m: Micro, layer: int) -> tuple[Tensor, ...]:
    """What crosses into `layer`, as meta tensors: shapes are declared, not found by a trial run."""
    cfg, dtype = decoder.cfg, decoder.dtype
    B, T = m.tokens.shape
    if layer == 0:
        return (m.tokens.to("meta"),)
    exact = torch.promote_types(dtype, torch.float32)
    if layer == cfg.layers:
        return (torch.empty(1, dtype=exact, device="meta", requires_grad=True),)
    part = mesh.tp if mesh.layout.sequence else 1
    h = torch.empty(B, T // part, cfg.width, dtype=dtype, device="meta", requires_grad=True)
    experts = next((b.channel.experts for b in cfg.kinds() if b.channel.kind == "moe"), 0)
    logits = torch.empty(B, T // mesh.tp, experts, dtype=exact, device="meta", requires_grad=True)
    return (h, h, *[logits] * routes(cfg, layer))
