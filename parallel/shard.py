"""Data parallelism: FSDP2 over whole mixers, and explicit sums for every gradient that no engine sees.

Which ranks a gradient is summed over (always SUM; the global token count divides once, in the step):

weight                              over
embedding, head, split by tp        dp
unsplit inside a mixer              dp and tp: this rank saw its share of the work
norm in front of a mixer            dp, and tp under sequence parallel: this rank saw its own tokens
shared key-value heads              dp and the tp ranks that hold the same head
split by ep                         edp, the ranks that hold the same experts; never tp as such
tied embedding of two stages        dp and the first and the last stage, which holds it too
"""
from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from stepladder.model.config import ModelConfig
from stepladder.model.decoder import Decoder, blocks
from stepladder.model.leaf import Decl, declared
from stepladder.ops.parts import add
from stepladder.parallel.mesh import Mesh
from stepladder.parallel.tensor import all_gather_single, reduce_scatter_single
from stepladder.parallel.watch import watch

BUCKET = 1 << 26         # numbers summed at once


def local(t: Tensor) -> Tensor:
    """The slice this rank holds, sharing memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def wrap(root: nn.Module, model: Decoder, mesh: Mesh, dtype: torch.dtype) -> dict[str, int]:
    """Put FSDP2 around every mixer of `model` and around `root`; returns parameter name -> the dimension it shards.

    Only parameters of two and more dimensions are sharded: norms, decays and biases are small, stay fp32, and are
    reduced explicitly. The sharded dimension is one that tp and ep do not cut. With offload, what is sharded lives on
    the host and comes for its forward and its backward, on one data-parallel rank too; the rest lives on the device.
    DeepSpeed gets the same ones, see zero.py; here they are only chosen.
    """
    sharded: dict[str, int] = {}
    offload = mesh.layout.offload
    if not mesh.layout.shard or (mesh.dp * mesh.tp == 1 and not mesh.layout.handed_over):
        return sharded
    dense, expert = mesh.dp // mesh.layout.dp_replicate, mesh.edp
    least = 1 if mesh.layout.handed_over else 2     # ranks that are worth FSDP
    ignored: set[nn.Parameter] = set()
    dims: dict[nn.Parameter, int] = {}
    decls = declared(model)
    for name, decl in decls.items():
        p, leaf = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        ranks = dense if decl.ep is None else expert
        taken = {decl.tp if mesh.tp > 1 else None, decl.ep if mesh.ep > 1 else None}
        dim = None if leaf.replicated or ranks < least else _dimension(tuple(p.shape), taken, ranks)
        if dim is None or not p.requires_grad:      # norms, decays, biases, routers
            p.data = p.data.to(mesh.device)
            ignored.add(p)
        else:
            dims[p], sharded[name] = dim, dim
    if mesh.layout.engine == "deepspeed":
        return sharded
    # Outputs are read, summed and sent, never written in place (Comm.leave): what this warns of cannot happen.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    over = {} if dense < least else {
        "shard": mesh.dense["replicate", "shard"] if mesh.layout.dp_replicate > 1 else mesh.data}
    if expert >= least and any(decl.ep is not None for decl in decls.values()):
        over["edp"] = mesh.expert["edp"]
    policies = {axis: _policy(mesh, axis, dtype) for axis in over}
    if any(mesh.slim(axis) for axis in over):
        _leave_room(mesh.layout.shard_ctas)
    home = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload else OffloadPolicy()
    names = {module: name for name, module in model.named_modules()}

    def apply(module: nn.Module, axis: str, reshard: bool) -> None:
        if axis not in over:
            return
        fully_shard(module, mesh=over[axis], mp_policy=policies[axis], reshard_after_forward=reshard,  # pyright: ignore
                    ignored_params=ignored, shard_placement_fn=lambda p: Shard(dims[p]), offload_policy=home)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)               # sums, not means
        module.set_force_sum_reduction_for_comms(True)       # gloo has no scaled sums
        where = names.get(module, "the model's ends")
        by = mesh.slim(axis) if module in names else None    # at the ends nothing runs beside: all NCCL can take
        module.set_custom_all_gather(_Noted(all_gather_single, f"all-gather of {where}'s weights", by))  # pyright: ignore
        module.set_custom_reduce_scatter(_Added(reduce_scatter_single, f"reduce-scatter of {where}'s gradients", by))  # pyright: ignore

    for block in blocks(model):
        experts = getattr(block.channel, "experts", None)
        if experts is not None:
            apply(experts, "edp", mesh.layout.reshard)
        apply(block.token, "shard", mesh.layout.reshard)
        apply(block.channel, "shard", mesh.layout.reshard)
    if model.head is not None and not model.cfg.tied:         # by itself it travels beside the blocks, not after them
        apply(model.head, "shard", False)
    apply(root, "shard", False)
    return sharded


def _policy(mesh: Mesh, axis: str, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Computing in dtype. Gradients travel as they are made between ranks of one machine; over several, all-to-all
    would send every part by itself, where NCCL adds parts up on their way. A pipeline adds its micro-batches' up in
    reduce_dtype before they travel. Inputs keep their types: router logits are fp32, and the next stage of a pipeline
    counts on it."""
    narrow = mesh.pp == 1 and mesh.near(axis)
    return MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False,
                                reduce_dtype=dtype if narrow else torch.promote_types(dtype, torch.float32))


def _leave_room(ctas: int) -> None:
    """Products take all multiprocessors but so many. They deal their tiles out beforehand, and one that finds some
    multiprocessors taken, by NCCL, waits for them with their share: up to its time again."""
    warnings.filterwarnings("ignore", message="torch.backends.cuda.preferred_blas_library is an experimental")
    torch.backends.cuda.preferred_blas_library("cublaslt")           # which heeds it; cublas does not
    torch._C._set_sm_carveout_experimental(ctas)


class _Noted:
    """FSDP's own collective, whose name the watchdog hears. by: another group of the same ranks."""

    def __init__(self, run: Callable[..., dist.Work | None], name: str, by: dist.ProcessGroup | None = None) -> None:
        self.run, self.name, self.by = run, name, by

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup,
                 **options: Any) -> dist.Work | None:
        watch.note(self.name)
        return self.run(output_tensor, input_tensor, group=self.by or group, **options)


class _Added(_Noted):
    """A reduce-scatter whose parts travel in the type they have and are added in fp32, or wider: the same numbers as if
    they had been widened first, in half the bytes."""
    given = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """By turns the parts to send and their sum."""
        self.given = not self.given
        return super().allocate(size, dtype=dtype if self.given else torch.promote_types(dtype, torch.float32),
                                device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup,
                 **options: Any) -> dist.Work | None:
        if output_tensor.dtype == input_tensor.dtype:
            return super().__call__(output_tensor, input_tensor, group, **options)
        watch.note(self.name)
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=self.by or group)
        add(parts.view(dist.get_world_size(group), -1).unbind(), output_tensor)


def _dimension(shape: tuple[int, ...], taken: set[int | None], ranks: int) -> int | None:
    """The first dimension that is free and divides, or the first of all with a smaller last piece: FSDP cuts no other
    dimension unevenly. None: every rank holds all of it."""
    if len(shape) < 2:
        return None
    uneven = 0 not in taken and -(-shape[0] // ranks) * (ranks - 1) < shape[0]
    return next((i for i, n in enumerate(shape) if i not in taken and n % ranks == 0), 0 if uneven else None)


class Sums:
    """The explicit gradient sums, bucketed: few collectives a group and dtype."""

    def __init__(self, models: Sequence[Decoder], mesh: Mesh, sharded: dict[str, int]):
        self.device = mesh.device
        self.buckets: dict[tuple[dist.ProcessGroup, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        norms = {f"blocks.{i}.{n}.scale" for m in models for i in m.blocks for n in ("norm1", "norm2")} | {"norm.scale"}
        todo = {name: (decl, m.get_parameter(name)) for m in models for name, decl in declared(m).items()}
        for name, (decl, p) in todo.items():
            if p.requires_grad:
                groups = _groups(decl, mesh, name in sharded, name in norms)
                if (ends := pair(name, models[0].cfg, mesh)) is not None:
                    groups.append(ends)
                for group in groups:
                    self.buckets[group, p.dtype].append(p)

    def __call__(self) -> None:
        for (group, _), params in self.buckets.items():
            for some in _runs(params):
                self._add_up(some, group)

    def _add_up(self, params: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        grads = []
        for p in params:
            if p.grad is None:                        # no token came this way; other ranks still take part
                p.grad = torch.zeros_like(p)
            grads.append(local(p.grad))
        flat = torch.cat([g.flatten().to(self.device) for g in grads])      # offloaded ones come and go again
        dist.all_reduce(flat, group=group)
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


def _runs(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """As many at once as BUCKET has room for, or one: all of them would take the memory of all gradients again."""
    run, size = [], 0
    for p in params:
        if run and size + local(p).numel() > BUCKET:
            yield run
            run, size = [], 0
        run.append(p)
        size += local(p).numel()
    yield run


def _groups(decl: Decl, mesh: Mesh, sharded: bool, norm: bool) -> list[dist.ProcessGroup]:
    if decl.ep is not None:
        return [] if sharded or mesh.edp == 1 else [mesh.group("edp")]
    out = [] if sharded or mesh.dp == 1 else [mesh.group("dp")]
    if mesh.tp == 1:
        return out
    if decl.tp is None and (not norm or mesh.layout.sequence):
        out.append(mesh.group("tp"))
    elif decl.tp is not None and decl.pieces(mesh.tp) < mesh.tp:
        out.append(mesh.units(decl.pieces(mesh.tp))["copy"].get_group())
    return out


def pair(name: str, cfg: ModelConfig, mesh: Mesh) -> dist.ProcessGroup | None:
    """The two ranks that hold a parameter because it is on the first and on the last stage: a tied embedding."""
    return mesh.ends if cfg.tied and name == "embed.table" else None


def copies(decl: Decl, mesh: Mesh, sharded: bool) -> int:
    """How many ranks of this pipeline stage hold the same piece of a parameter."""
    if decl.ep is not None:
        return 1 if sharded else mesh.edp
    data = mesh.layout.dp_replicate if sharded else mesh.dp
    return data * (mesh.tp // decl.pieces(mesh.tp) if decl.tp is not None else mesh.tp)
