"""What every mixer may know about the tokens it is given."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Context(NamedTuple):
    pos: Tensor                      # (B, T) position inside the document
    start: Tensor                    # (B, T) true on a document's first token
    doc: Tensor | None = None        # (B, T) number of the document inside the row; None: a row is one document
    borders: Tensor | None = None    # (N + 1,) int32 where documents begin in the flattened rows, padded with B * T
    table: Any = None                # what the mixer's own table() made of the above, once for all layers of its Spec

    @classmethod
    def plain(cls, B: int, T: int, device: torch.device | str = "cpu") -> Context:
        """Every row is one document, from its first token."""
        pos = torch.arange(T, device=device).expand(B, T)
        return cls(pos, pos == 0)

    @classmethod
    def after(cls, pos: Tensor, T: int) -> Context:
        """T more tokens of each row's document, of which pos (B,) have been read; for decoding."""
        pos = pos.unsqueeze(1) + torch.arange(T, device=pos.device)
        return cls(pos, pos == 0, torch.zeros_like(pos))

    @classmethod
    def packed(cls, start: Tensor, borders: Tensor | None = None) -> Context:
        """start (B, T) bool; borders from `borders(start)` on the CPU, needed by the GPU's variable-length kernels."""
        at = torch.arange(start.shape[1], device=start.device).expand_as(start)
        first = torch.where(start, at, 0).cummax(1).values
        return cls(at - first, start, start.long().cumsum(1), borders)


def borders(start: Tensor) -> Tensor:
    """start (B, T) bool on the CPU -> int32 offsets of documents in the flattened rows, then padding of B * T.

    There are as many as a power of two, of at least 8 documents a row, and one: shapes repeat, and kernels are seldom
    built anew. No more than that: variable-length attention starts as many blocks for an empty document as for one that
    fills a row.
    """
    B, T = start.shape
    start = start.clone()
    start[:, 0] = True                                   # rows are independent, whatever they begin with
    at = start.flatten().nonzero().flatten()
    size = 1 << (max(8 * B, len(at)) - 1).bit_length()
    out = torch.full((size + 1,), B * T, dtype=torch.int32)
    out[:len(at)] = at.to(torch.int32)
    return out
