"""Expert parallelism: rows travel to the ranks that hold their experts, and back. Dropless, uneven."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepladder.ops import experts


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.args = receive, send, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return _AllToAll.apply(g, *ctx.args), None, None, None  # pyright: ignore[reportReturnType]


class AllToAll:
    """An Exchange over `group`, whose rank r holds experts r E/n .. (r + 1) E/n."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.n = dist.get_world_size(group)

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        counts = counts.view(self.n, -1)                             # (rank, its experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        # The one read of the device per MoE layer: uneven splits are host numbers.
        send, receive = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()
        rows = _AllToAll.apply(rows, send, receive, self.group)  # pyright: ignore[reportAssignmentType]
        local = torch.arange(counts.shape[1], device=rows.device).repeat(self.n)
        expert = local.repeat_interleave(arriving.flatten(), output_size=sum(receive))
        order = expert.argsort(stable=True)
        inverse = experts.invert(order)
        self.way_back = order, inverse, receive, send
        return experts.permute(rows, order, inverse), arriving.sum(0)

    def combine(self, rows: Tensor) -> Tensor:
        order, inverse, receive, send = self.way_back
        return _AllToAll.apply(experts.permute(rows, inverse, order), receive, send, self.group)  # pyright: ignore
