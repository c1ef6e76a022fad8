"""AdamW on this rank's pieces: one global norm over every mesh, one division by the token count, no host sync."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepladder.model.channel.moe import Mixer as MoE
from stepladder.model.decoder import blocks
from stepladder.parallel.build import Parts
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.pipeline import Result
from stepladder.parallel.shard import local
from stepladder.parallel.zero import MOMENTS, Zero


class Report(NamedTuple):
    """A step, equal on every rank and still on the device. Means are per target token, losses in nats."""
    loss: Tensor          # () with auxiliary losses of the head, without the routers'
    nll: Tensor           # ()
    count: Tensor         # () targets of the global batch
    norm: Tensor          # () of the gradient of the mean loss, before clipping
    load: Tensor          # (M, E) tokens each expert of each MoE layer got; E is the most that a layer has
    entropy: Tensor       # (M,) mean entropy of each router's distribution, nats
    balance: Tensor       # (M,) mean balance loss
    skipped: Tensor       # () steps skipped so far
    streak: Tensor        # () of them in a row, up to now
    memory: Tensor        # (ranks,) GiB that each said it took


class Optimizer:
    """Fused AdamW (arXiv:1711.05101). A step whose gradient is not finite changes nothing and is counted.

    Pieces that FSDP keeps in host memory are updated there, by the host; such a step waits for the device once.
    What DeepSpeed holds is updated by it, with the same norm, divisor and verdict.
    """

    def __init__(self, parts: Parts, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1, clip: float = 1.0):
        self.parts, self.clip = parts, clip
        self.copying: torch.cuda.Event | None = None             # when a checkpoint has copied what steps change
        self.zero = None
        if parts.mesh.layout.engine == "deepspeed":
            self.zero = Zero(parts, betas=betas, eps=eps, weight_decay=weight_decay)
        theirs = self.zero.params if self.zero is not None else {}
        self.params = {name: p for name, p in parts.parameters().items() if p.requires_grad and name not in theirs}
        # FSDP's DTensors and plain pieces do not mix in one fused call: optimise the local pieces of both.
        with torch.no_grad():
            self.pieces = {name: nn.Parameter(local(p)) for name, p in self.params.items()}
        decay = {True: weight_decay, False: 0.0}                 # norms, biases and decays are one-dimensional
        groups = [{"params": [p for n, p in self.pieces.items() if (len(parts.decls[n].shape) > 1) is big],
                   "weight_decay": decay[big]} for big in (True, False)]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.steps = torch.zeros((), device=parts.mesh.device)   # what every parameter's own count is
        for p in self.pieces.values():
            self.adam.state[p] = {"step": self.steps.to(p.device, copy=True), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        self.skipped, self.streak = (torch.zeros((), device=parts.mesh.device) for _ in range(2))
        self.memory = 0.0                                        # GiB that this rank takes, told by who trains
        self.each = torch.zeros(parts.mesh.size, device=parts.mesh.device)     # the same where this rank stands, else 0
        self.moe = {int(name): b.channel for decoder in parts.decoders
                    for name, b in zip(decoder.blocks, blocks(decoder), strict=True) if isinstance(b.channel, MoE)}
        # Pieces that several ranks hold count once in the global norm.
        self.once = torch.tensor([1 / parts.copies(name) for name in self.params], dtype=torch.float64,
                                 device=parts.mesh.device)
        kinds = parts.decoders[0].cfg.kinds()
        self.routed = [i for i, b in enumerate(kinds) if b.channel.kind == "moe"]
        self.experts: list[int] = [kinds[i].channel.experts for i in self.routed]
        self.top_k = torch.tensor([float(kinds[i].channel.top_k) for i in self.routed], device=parts.mesh.device)

    @torch.no_grad()
    def step(self, result: Result, lr: float) -> Report:
        """Clip, update, forget the gradients. Call after the gradient sums; every rank of the world calls it."""
        self.each[self.parts.mesh.rank].fill_(self.memory)
        report = self._report(result)
        norm, count = report.norm, report.count.to(report.norm.dtype)
        if self.copying is not None:
            torch.cuda.current_stream().wait_event(self.copying)
            self.copying = None
        if self.zero is not None:
            together = lambda theirs: report.norm.hypot(theirs / count)
            norm = together(self.zero.step(lr, self.steps, lambda theirs: self._verdict(together(theirs), count)))
        scale, bad = self._verdict(norm, count)
        self.skipped += bad
        self.steps += 1 - bad
        self.streak.add_(1).mul_(bad)
        found = bad
        if self.parts.mesh.layout.offload:     # AdamW would fetch them without waiting, and read before they are there
            scale, found = scale.cpu(), bad.cpu()
        for name, p in self.params.items():
            assert p.grad is not None, name
            self.pieces[name].grad = local(p.grad)
            p.grad = None
        if scale.dtype == torch.float64:       # the fused kernel divides in fp32: parity tests want all digits
            torch._foreach_div_([p.grad for p in self.pieces.values() if p.grad is not None], scale)
            self.adam.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        else:
            self.adam.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
        self.adam.found_inf = found  # pyright: ignore[reportAttributeAccessIssue]
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        for layer, mixer in self.moe.items():
            if mixer.spec.bias_rate:
                mixer.rebalance(report.load[self.routed.index(layer)][:mixer.spec.experts] * (1 - bad))
        return report._replace(norm=norm, skipped=self.skipped.clone(), streak=self.streak.clone())

    def _verdict(self, norm: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What summed gradients are divided by, and 1 if they are not finite and nothing may change. norm: of their
        mean."""
        bad = (~norm.isfinite()).float()
        if self.clip:
            count = count * (norm / self.clip).clamp_min(1.0).nan_to_num(nan=1.0, posinf=1.0)
        return count, bad

    @torch.no_grad()
    def _report(self, result: Result) -> Report:
        """One sum over the world of everything that has to be known of the step."""
        mesh, grads = self.parts.mesh, []
        for name, p in self.params.items():
            assert p.grad is not None, name
            grads.append(local(p.grad))
        squares = torch.stack(_norms(grads, mesh)).square()
        M, E = len(self.routed), max(self.experts, default=0)
        kind = squares.dtype
        layers = torch.zeros(M, E + 2, dtype=kind, device=mesh.device)
        for layer, s in zip(self.moe, result.stats, strict=True):
            row = layers[self.routed.index(layer)]
            row[:s.load.shape[0]], row[E], row[E + 1] = s.load.to(kind), s.entropy.to(kind), s.balance.to(kind)
        one = torch.stack([x.to(kind) for x in (result.loss, result.nll, result.count)]) / mesh.tp
        # A place for each rank: the sum has the largest, too.
        sums = torch.cat([(squares * self.once.to(kind)).sum().view(1), one, layers.flatten(), self.each.to(kind)])
        if not mesh.alone:
            dist.all_reduce(sums)
        square, loss, nll, count = sums[:4].unbind()
        count = count.clamp_min(1.0)
        layers, memory = sums[4:-mesh.size].view(M, E + 2), sums[-mesh.size:]
        tokens = (layers[:, :E].sum(1) / self.top_k).clamp_min(1.0)
        return Report(loss / count, nll / count, count, square.sqrt() / count, layers[:, :E], layers[:, E] / tokens,
                      layers[:, E + 1] / tokens, self.skipped, self.streak, memory)

    def crowds(self, load: Tensor) -> list[float]:
        """By how much the fullest expert of each MoE layer exceeds the mean. load: a report's, on the host."""
        return [float(x.max() / x[:n].mean().clamp_min(1e-9)) for x, n in zip(load, self.experts, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds of model and optimizer, labelled; sharing memory, so that loading fills it."""
        out: dict[str, Tensor] = {}
        if self.zero is not None:
            out |= self.zero.state()
        for name, p in self.parts.parameters().items():
            if self.zero is None or name not in self.zero.params:
                out[f"model/{name}"] = self.parts.label(name, p.detach())
        for name, p in self.pieces.items():
            for key in MOMENTS:
                out[f"optimizer/{key}/{name}"] = self.parts.label(name, self.adam.state[p][key])
        out["optimizer/step"] = self.steps
        out["optimizer/skipped"] = self.skipped
        out["optimizer/streak"] = self.streak
        return out

    def loaded(self) -> None:
        """After state() has been filled from a checkpoint."""
        if self.zero is not None:
            self.zero.loaded()
        for state in self.adam.state.values():
            state["step"].copy_(self.steps)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> declared shape of everything state() holds."""
        whole = {name: decl.shape for name, decl in self.parts.decls.items()}
        learned = {**self.params, **(self.zero.params if self.zero is not None else {})}
        return ({f"model/{name}": shape for name, shape in whole.items()}
                | {f"optimizer/{key}/{name}": whole[name] for key in MOMENTS for name in learned}
                | {f"optimizer/{key}": () for key in ("step", "skipped", "streak")})


def _norms(grads: list[Tensor], mesh: Mesh) -> tuple[Tensor, ...]:
    """On the device. A host sums rows by themselves, then in fp64: in fp32 it would lose a hundredth over 1e8 elements,
    and all of it in fp64 takes longer than AdamW."""
    if not mesh.layout.offload:
        return torch._foreach_norm(grads)
    rows = lambda g: torch.linalg.vector_norm(g, dim=-1) if g.device.type == "cpu" and g.dim() > 1 else g
    exact = lambda g: torch.linalg.vector_norm(rows(g), dtype=torch.float64 if g.device.type == "cpu" else None)
    return tuple(exact(g).to(mesh.device, g.dtype) for g in grads)
