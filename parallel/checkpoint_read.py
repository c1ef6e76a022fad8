"""Tensors out of a checkpoint folder, by one rank alone, in any layout.

torch.distributed.checkpoint plans which part of which tensor is read; checkpoint_folder.py is what lies on disk.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from stepladder.parallel.checkpoint_folder import INDEX, CheckpointError, read_index

ALIGN = 64  # bytes; a tensor in a mapped file must start at a multiple of its element size
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def names(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of every tensor of the checkpoint."""
    return {name: (tuple(e["shape"]), DTYPES[e["dtype"]]) for name, e in read_index(path)["tensors"].items()}


def misfit(state: dict[str, Tensor], index: dict[str, Any]) -> str | None:
    """The first tensor of state that the checkpoint cannot fill."""
    for name, tensor in state.items():
        entry = index["tensors"].get(name)
        if entry is None:
            return f"{name} {tuple(tensor.shape)} is not in the checkpoint"
        if tuple(tensor.shape) != tuple(entry["shape"]):
            return f"{name} is {tuple(entry['shape'])} in the checkpoint, {tuple(tensor.shape)} in this model"
        if tensor.dtype != DTYPES[entry["dtype"]]:
            return f"{name} is torch.{entry['dtype']} in the checkpoint, {tensor.dtype} in this model"
    return None


@torch.no_grad()
def fill(path: Path, state: dict[str, Tensor], index: dict[str, Any] | None = None) -> None:
    """Fill the tensors of state, in any layout, on this rank alone; what state does not name is not read.

    Raises CheckpointError naming the tensor and both shapes or dtypes. Checksums are not compared: see `valid`.
    """
    index = read_index(path) if index is None else index
    if problem := misfit(state, index):
        raise CheckpointError(f"{path}: {problem}")
    files: dict[str, mmap.mmap] = {}
    chunks = {(name, *chunk[0]): chunk for name in state for chunk in index["tensors"][name]["chunks"]}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, _dcp_metadata(index, state), is_coordinator=False)
    for request in planner.create_local_plan().items:
        target = planner.resolve_tensor(request)
        if not target.numel():
            continue
        _, sizes, file, start = chunks[request.storage_index.fqn, *(request.storage_index.offset or ())]
        if file not in index["files"]:
            raise CheckpointError(f"{path / INDEX} reads from {file!r}, which is not a file of the checkpoint")
        if file not in files:  # mapped, so that a slice of a chunk costs its own pages only
            with open(path / file, "rb") as opened:  # private: torch insists on memory that it could write to
                files[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        source = torch.frombuffer(files[file], dtype=target.dtype, count=math.prod(sizes), offset=start).view(sizes)
        for dim, (offset, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            source = source.narrow(dim, offset, length)
        target.copy_(source)


def _dcp_metadata(index: dict[str, Any], state: dict[str, Tensor]) -> Metadata:
    """The index as DCP's load planner wants it. Never BytesStorageMetadata: the planner unpickles those."""
    tensors = {}
    for name in state:
        entry = index["tensors"][name]
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes, *_ in entry["chunks"]]
        properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(tensors)
