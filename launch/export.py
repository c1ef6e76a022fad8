"""stepladder export: the model of a checkpoint, or of a run's newest sound one, as one safetensors file."""

import argparse
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from stepladder.launch.generate import find
from stepladder.parallel.checkpoint import CheckpointError, fill, meta, names
from stepladder.parallel.checkpoint_folder import read_index

MODEL = "model/"
TYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def run(args: argparse.Namespace) -> None:
    """Write args.out from args.run. The file's metadata holds the resolved configuration (TOML) and the step."""
    source, target = Path(args.run), Path(args.out)
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another name")
    path = find(source)
    index, about = read_index(path), meta(path)
    tensors = {name: found for name, found in names(path).items() if name.startswith(MODEL)}
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])))  # so that all are aligned

    def values() -> Iterator[Tensor]:
        for name, (shape, dtype) in tensors.items():
            value = torch.empty(shape, dtype=dtype)
            fill(path, {name: value}, index)
            if value.dtype.itemsize > 1 and not value.isfinite().all():  # which torch cannot ask of 8 bits
                raise CheckpointError(f"{path}: {name} is not finite; choose an earlier checkpoint")
            yield value

    notes = {"format": "pt", "step": str(about["step"]), "config": about["config"]}
    renamed = {name.removeprefix(MODEL): found for name, found in tensors.items()}
    size = write(target, renamed, notes, values())
    print(f"{target}: {len(tensors)} tensors, {size / 1e6:.1f} MB, step {about['step']}")


def write(
    target: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    notes: dict[str, str],
    values: Iterable[Tensor],
) -> int:
    """Write a safetensors file one tensor at a time, in the order of `tensors`; returns its data bytes.

    The safetensors package wants them all in memory at once, and the format is a length, a JSON header and the bytes.
    """
    header: dict[str, object] = {"__metadata__": notes}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for value in values:
                file.write(value.flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        temporary.rename(target)
    except OSError as error:
        if error.filename is None:  # of a write
            raise CheckpointError(f"{target}: {error.strerror}; make room, or choose another place") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return end
