"""Where a rank stands. World rank = ((pp * dp) + dp rank) * tp + tp rank: tp ranks are neighbours, stages far apart."""
from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from stepladder.model.leaf import Decl
from stepladder.parallel.support import Parallel


@dataclass(frozen=True)
class Mesh:
    """Coordinates and groups. Expert ranks fold over dp x tp: ep neighbours first, the rest (edp) holds copies."""
    layout: Parallel
    device: torch.device
    rank: int = 0
    size: int = 1
    patience: timedelta | None = None      # torch's own limit for a collective; None: its default
    local: int = 0                         # ranks of this machine; 0: all of them

    def __post_init__(self) -> None:
        p = self.layout
        if self.size % (p.tp * p.pp):
            raise ValueError(f"world size {self.size} is not a multiple of tp * pp = {p.tp} * {p.pp}; start "
                             f"{p.tp * p.pp} processes, or a multiple of it")
        if self.dp % p.dp_replicate:
            raise ValueError(f"data-parallel size {self.dp} is not divisible by dp_replicate = {p.dp_replicate}")
        if self.dp * p.tp % p.ep:
            raise ValueError(f"ep = {p.ep} does not divide dp * tp = {self.dp} * {p.tp}")

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def pp(self) -> int:
        return self.layout.pp

    @property
    def ep(self) -> int:
        return self.layout.ep

    @property
    def dp(self) -> int:
        return self.size // (self.tp * self.pp)

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp * self.tp // self.ep

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.dp)

    @property
    def ep_rank(self) -> int:
        return self.rank % (self.dp * self.tp) % self.ep

    @cached_property
    def dense(self) -> DeviceMesh:
        """(pp, replicate, shard, tp)"""
        r = self.layout.dp_replicate
        return self._view((self.pp, r, self.dp // r, self.tp), ("pp", "replicate", "shard", "tp"))

    @cached_property
    def data(self) -> DeviceMesh:
        """(dp,); a view of its own only under HSDP: every view costs communicators."""
        if self.layout.dp_replicate == 1:
            return self.dense["shard"]
        return self._view((self.pp, self.dp, self.tp), ("pp", "dp", "tp"))["dp"]

    @cached_property
    def expert(self) -> DeviceMesh:
        """(pp, edp, ep)"""
        return self._view((self.pp, self.edp, self.ep), ("pp", "edp", "ep"))

    def units(self, pieces: int) -> DeviceMesh:
        """(pp, replicate, shard, piece, copy): tp ranks grouped by which of `pieces` slices they hold."""
        made = self._units
        if pieces not in made:
            r = self.layout.dp_replicate
            made[pieces] = self._view((self.pp, r, self.dp // r, pieces, self.tp // pieces),
                                      ("pp", "replicate", "shard", "piece", "copy"))
        return made[pieces]

    @cached_property
    def _units(self) -> dict[int, DeviceMesh]:
        return {}

    def stage(self, view: DeviceMesh) -> DeviceMesh:
        """A view without its pp. Kept: to cut one takes milliseconds, and every tensor of a checkpoint wants it."""
        made, names = self._stages, view.mesh_dim_names or ()
        if (names, view.shape) not in made:
            made[names, view.shape] = view[names[1:]]
        return made[names, view.shape]

    @cached_property
    def _stages(self) -> dict[tuple[tuple[str, ...], tuple[int, ...]], DeviceMesh]:
        return {}

    def _view(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        view = DeviceMesh(self.device.type, torch.arange(self.size).view(shape), mesh_dim_names=names)
        if self.patience is not None:                  # new groups do not take it from the group of all ranks
            for group in view.get_all_groups():
                dist.distributed_c10d._set_pg_timeout(self.patience, group)
        return view

    @cached_property
    def ends(self) -> dist.ProcessGroup | None:
        """The ranks of the first and the last stage, which share a tied embedding; None on a rank between them, and
        where one rank holds both."""
        first, *_, last = range(0, self.size, self.dp * self.tp) if self.pp > 1 else (0, 0)
        if first == last or self.layout.schedule == "zero-bubble":
            return None
        pairs = [[first + r, last + r] for r in range(self.dp * self.tp)]
        group, _ = dist.new_subgroups_by_enumeration(pairs, timeout=self.patience)
        return None if isinstance(group, int) else group

    @cached_property
    def edges(self) -> dict[tuple[int, int], dist.ProcessGroup]:
        """A group for each way that a pipeline's pieces are sent: (pp rank that sends, the one that receives).

        NCCL works off a group's transfers in order: with one for all stages an output waits behind an input that has
        been asked for and is still being made elsewhere (pp 4, interleaved: a bubble of 18 % instead of 10). Empty on
        a CPU, where transfers do not wait for one another, and for 1F1B, which asks when it has nothing else to do.
        """
        if self.pp == 1 or self.layout.schedule == "1f1b" or self.device.type == "cpu":
            return {}
        return self._edges()

    def _edges(self) -> dict[tuple[int, int], dist.ProcessGroup]:
        made, column, ring = {}, self.dp * self.tp, self.layout.schedule == "interleaved"
        for a in range(self.pp):
            for b in sorted({(a + 1) % self.pp, (a - 1) % self.pp} if ring else {a - 1, a + 1} & {*range(self.pp)}):
                pairs = [[a * column + i, b * column + i] for i in range(column)]
                group, _ = dist.new_subgroups_by_enumeration(pairs, timeout=self.patience)
                if isinstance(group, dist.ProcessGroup):
                    made[a, b] = group
        return made

    def connect(self, decls: Iterable[Decl], tied: bool = False) -> None:
        """Make every group that parameters declared so will need. Collective: all ranks, the same whole model."""
        if self.alone and not self.layout.handed_over:
            return
        if self.alone and not dist.is_initialized():       # engines want a group even of one rank
            dist.init_process_group("gloo" if self.device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0,
                                    world_size=1)
        every = list(decls)
        _ = self.dense, self.data, self.slim("shard")
        if tied:
            _ = self.ends
        if any(d.ep is not None for d in every):
            _ = self.expert, self.slim("edp")
            self.beside("ep")
        self.beside("tp")
        _ = self.edges
        for pieces in sorted({d.pieces(self.tp) for d in every if d.tp is not None} - {self.tp}):
            self.units(pieces)

    def group(self, name: str) -> dist.ProcessGroup:
        """Process group of one axis: pp, dp, or its replicate and shard, tp, ep or edp."""
        if name == "dp":
            return self.data.get_group()
        return (self.expert if name in ("ep", "edp") else self.dense)[name].get_group()

    def beside(self, axis: str) -> dist.ProcessGroup | None:
        """A second group of the ranks of tp or ep: NCCL works off a group's collectives in the order of their calls,
        and what runs beside the mixers must not queue behind what waits for one. None on a CPU, where calls block."""
        n = self.tp if axis == "tp" else self.ep
        if n == 1 or self.device.type == "cpu":
            return None
        if axis not in self._beside:
            rows = torch.arange(self.size).view(-1, n).tolist()
            group, _ = dist.new_subgroups_by_enumeration(rows, timeout=self.patience)
            assert isinstance(group, dist.ProcessGroup)
            self._beside[axis] = group
        return self._beside[axis]

    @cached_property
    def _beside(self) -> dict[str, dist.ProcessGroup]:
        return {}

    def slim(self, axis: str) -> dist.ProcessGroup | None:
        """A second group of the ranks of shard or edp, whose collectives take parallel.shard_ctas multiprocessors. None
        where NCCL shall choose, or has nothing to do."""
        p = self.layout
        n, step = (self.dp // p.dp_replicate, self.tp) if axis == "shard" else (self.edp, self.ep)
        if not p.shard_ctas or n == 1 or self.device.type == "cpu":
            return None
        if (n, step) not in self._slim:
            options = dist.ProcessGroupNCCL.Options()
            options.config.max_ctas = p.shard_ctas
            rows = torch.arange(self.size).view(-1, n, step).transpose(1, 2).reshape(-1, n).tolist()
            with warnings.catch_warnings():            # of options that have no timeout of their own
                warnings.filterwarnings("ignore", message="backend_options._timeout was specified")
                group, _ = dist.new_subgroups_by_enumeration(rows, timeout=self.patience, pg_options=options)
            assert isinstance(group, dist.ProcessGroup)
            self._slim[n, step] = group
        return self._slim[n, step]

    @cached_property
    def _slim(self) -> dict[tuple[int, int], dist.ProcessGroup]:
        return {}

    def near(self, axis: str) -> bool:
        """Whether a group of an axis lies in one machine. Collective: its ranks agree, though machines may hold unequal
        numbers of them."""
        n, group = self.local or self.size, self.group(axis)
        far = any(rank // n != self.rank // n for rank in dist.get_process_group_ranks(group))
        if n < self.size:
            dist.all_reduce(said := torch.tensor(float(far), device=self.device), group=group)
            far = bool(said.item())
        return not far

    @property
    def alone(self) -> bool:
        return self.size == 1

    def at(self, rank: int) -> Mesh:
        """The same mesh as another rank sees it, for its coordinates."""
        return replace(self, rank=rank)

    @property
    def place(self) -> str:
        return f"pp {self.pp_rank}, dp {self.dp_rank}, tp {self.tp_rank}, ep {self.ep_rank}"

    def __repr__(self) -> str:
        p = self.layout
        data = f"dp{self.dp}" + (f"={p.dp_replicate}x{self.dp // p.dp_replicate}" if p.dp_replicate > 1 else "")
        engine = f" zero{p.zero_stage}" if p.engine == "deepspeed" else " fsdp" if p.shard and (
            self.dp > 1 or p.offload) else ""
        said = [f"pp{self.pp}{f' {p.schedule}' if self.pp > 1 else ''}",
                f"{data}{engine}{' offload' if p.offload else ''}{f' to {p.nvme}' if p.nvme else ''}",
                f"tp{self.tp}{' sp' if p.sequence else ''}"]
        return f"Mesh({self.size} {self.device.type}: {' x '.join(said)}, ep{self.ep} x edp{self.edp})"
