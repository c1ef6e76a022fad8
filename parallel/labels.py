"""One function says which slice of which whole a tensor is: parameters and optimizer moments alike.

Saved without a label, tensor-parallel slices under one name overwrite each other silently.
"""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from stepladder.model.leaf import Decl
from stepladder.parallel.mesh import Mesh


def label(piece: Tensor, decl: Decl, mesh: Mesh, sharded: int | None) -> Tensor:
    """This rank's piece of a parameter as a DTensor over its stage's mesh, sharing memory; plain on one rank.

    `sharded` is the dimension FSDP cut, None if it did not. Raises AssertionError if the pieces do not make the
    declared whole.
    """
    if mesh.alone:
        whole = piece
    else:
        data = Replicate() if sharded is None else Shard(sharded)
        if decl.ep is not None:
            over, places = mesh.expert["edp", "ep"], [data, Shard(decl.ep)]
        elif decl.tp is not None and decl.pieces(mesh.tp) < mesh.tp:
            over = mesh.units(decl.pieces(mesh.tp))["replicate", "shard", "piece", "copy"]
            places = [Replicate(), data, Shard(decl.tp), Replicate()]
        else:
            over = mesh.dense["replicate", "shard", "tp"]
            places = [Replicate(), data, Replicate() if decl.tp is None else Shard(decl.tp)]
        whole = held(piece.detach(), over, places)
    assert tuple(whole.shape) == decl.shape, f"pieces make {tuple(whole.shape)}, declared is {decl.shape}"
    return whole


def held(piece: Tensor, over: DeviceMesh, places: Sequence[Placement]) -> DTensor:
    """DTensor.from_local, but a piece in host memory stays there: a copy on the device would be loaded in vain."""
    if piece.device.type == over.device_type:
        return DTensor.from_local(piece, over, places, run_check=False)
    spec = DTensor.from_local(piece.to("meta"), over, places, run_check=False)._spec
    return DTensor(piece, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]
