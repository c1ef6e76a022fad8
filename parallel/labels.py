"""One function says which slice of which whole a tensor is: parameters and optimizer moments alike.

Saved without a label, tensor-parallel slices under one name overwrite each other silently.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from stepladder.model.leaf import Decl
from stepladder.parallel.mesh import Mesh


def label(piece: Tensor, decl: Decl, mesh: Mesh, sharded: int | None) -> Tensor:
    """This rank's piece of a parameter as a DTensor over its stage's mesh, sharing memory; plain on one rank.

    `sharded` is the dimension FSDP cut, None if it did not. Raises AssertionError if the piece is not what this rank
    holds of the declared whole.
    """
    if mesh.alone:
        whole = piece
    else:
        along = lambda dim, ranks: Replicate() if dim is None or ranks == 1 else Shard(dim)
        data = Replicate() if sharded is None else Shard(sharded)
        if decl.ep is not None:
            over, places = mesh.expert, [data, along(decl.ep, mesh.ep)]
        elif decl.tp is not None and decl.pieces(mesh.tp) < mesh.tp:
            over = mesh.units(decl.pieces(mesh.tp))
            places = [Replicate(), data, Shard(decl.tp), Replicate()]
        else:
            over = mesh.dense
            places = [Replicate(), data, along(decl.tp, mesh.tp)]
        whole = held(piece.detach(), decl.shape, mesh.stage(over), places)
    assert tuple(whole.shape) == decl.shape, f"the piece is {tuple(whole.shape)}, declared is {decl.shape}"
    return whole


def span(n: int, rank: int, ranks: int) -> range:
    """The indices below n that a rank holds: all ranks as many, but for the last ones."""
    each = -(-n // ranks)
    return range(min(n, rank * each), min(n, rank * each + each))


def held(piece: Tensor, shape: tuple[int, ...], over: DeviceMesh, places: Sequence[Placement]) -> DTensor:
    """DTensor.from_local, but a piece in host memory stays there: a copy on the device would be loaded in vain."""
    due = list(shape)
    for ranks, rank, place in zip(over.shape, over.get_coordinate() or (), places, strict=True):
        if isinstance(place, Shard):
            due[place.dim] = len(span(due[place.dim], rank, ranks))
    assert list(piece.shape) == due, f"the piece is {tuple(piece.shape)}, of the declared {shape} it should be {due}"
    whole = {"shape": torch.Size(shape), "stride": torch.empty(shape, device="meta").stride()}
    if piece.device.type == over.device_type:
        return DTensor.from_local(piece, over, places, run_check=False, **whole)
    spec = DTensor.from_local(piece.to("meta"), over, places, run_check=False, **whole)._spec
    return DTensor(piece, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]
