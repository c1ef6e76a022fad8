"""Slices and initial values. A parameter's name seeds it and then it is sliced, so no layout changes a value."""
from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepladder.model.decoder import Decoder
from stepladder.model.leaf import Decl, Leaf, declared
from stepladder.parallel.mesh import Mesh


class Cut(NamedTuple):
    """Slice `index` of `pieces` equal ones along `dim`."""
    dim: int
    index: int
    pieces: int


def cut(name: str, decl: Decl, mesh: Mesh) -> Cut | None:
    """Which slice of a parameter this rank holds; ValueError where it cannot be cut."""
    if decl.ep is not None and mesh.ep > 1:
        axis, dim, pieces, index = f"ep={mesh.ep}", decl.ep, mesh.ep, mesh.ep_rank
        whole = decl.shape[dim]
    elif decl.tp is not None and mesh.tp > 1:
        axis, dim, pieces = f"tp={mesh.tp}", decl.tp, decl.pieces(mesh.tp)
        index = mesh.tp_rank * pieces // mesh.tp
        whole = decl.units or decl.shape[dim]
    else:
        return None
    if whole % pieces or (decl.share and mesh.tp % pieces):
        what = f"{whole} heads in dimension {dim} do" if decl.units else f"dimension {dim} does"
        raise ValueError(f"{name} {decl.shape}: {what} not divide over {axis}")
    return Cut(dim, index, pieces)


def split(model: Decoder, mesh: Mesh) -> None:
    """Shrink every declared parameter to this rank's slice; values come from fill()."""
    for path, leaf in model.named_modules():
        if isinstance(leaf, Leaf):
            for name, decl in leaf.decls.items():
                p, c = leaf.get_parameter(name), cut(f"{path}.{name}", decl, mesh)
                if c is not None:
                    shape = [n // c.pieces if i == c.dim else n for i, n in enumerate(decl.shape)]
                    setattr(leaf, name, nn.Parameter(p.new_empty(shape), requires_grad=p.requires_grad))


def values(name: str, decl: Decl, c: Cut | None, seed: int) -> Tensor:
    """This rank's slice of the initial value, in fp32 whatever the weights are: random numbers depend on the type.

    Each expert has a seed of its own: others' experts are never made.
    """
    if decl.ep is None:
        whole = decl.init(torch.empty(decl.shape), _generator(f"{seed}/{name}"))
        return whole if c is None else whole.chunk(c.pieces, c.dim)[c.index]
    assert decl.ep == 0
    n = decl.shape[0] // (c.pieces if c is not None else 1)
    held = range(n) if c is None else range(c.index * n, (c.index + 1) * n)
    return torch.stack([decl.init(torch.empty(decl.shape[1:]), _generator(f"{seed}/{name}/{e}"))
                        for e in held])


def fill(model: Decoder, mesh: Mesh, seed: int) -> None:
    """Initial values for every parameter in place; on the CPU, in threads, so that they depend on nothing else."""
    todo = list(declared(model).items())

    def one(item: tuple[str, Decl]) -> None:
        name, decl = item
        p = model.get_parameter(name)
        with torch.no_grad():
            p.copy_(values(name, decl, cut(name, decl, mesh), seed))

    with ThreadPoolExecutor(min(16, torch.get_num_threads())) as pool:
        list(pool.map(one, todo))


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(seed.encode()))       # 32 bits are all that it takes on a CPU
